"""Where metrics go. A new sink is a file beside these and a line in `SINKS`."""

from __future__ import annotations

from collections.abc import Callable

from hvdtrain.rundir.directory import RunDirectory
from hvdtrain.rundir.sinks.console import Console, describe
from hvdtrain.rundir.sinks.json_lines import JsonLines
from hvdtrain.rundir.sinks.sink import Metrics, Sink
from hvdtrain.rundir.sinks.tensorboard import TensorBoard
from hvdtrain.settings import LogConfig

# Name -> class, made with the run's directory, and whether the settings ask for it.
SINKS: dict[str, tuple[Callable[[RunDirectory], Sink], Callable[[LogConfig], bool]]] = {
    "jsonl": (JsonLines, lambda log: True),
    "tensorboard": (TensorBoard, lambda log: log.tensorboard),
}

__all__ = ["SINKS", "Console", "JsonLines", "Metrics", "Sink", "TensorBoard", "build_sinks", "describe"]


def build_sinks(run: RunDirectory, log: LogConfig) -> list[Sink]:
    """Return the sinks that the settings ask for; nothing is written before their `begin`.

    Raises:
        ConfigError: a library that one of them needs is not installed.
    """
    return [build(run) for build, is_wanted in SINKS.values() if is_wanted(log)]
