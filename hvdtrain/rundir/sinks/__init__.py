"""Where metrics go. A new sink is a file beside these and a line in `SINKS`."""

from __future__ import annotations

from collections.abc import Callable

from hvdtrain.rundir.directory import RunDirectory
from hvdtrain.rundir.sinks.console import Console, describe
from hvdtrain.rundir.sinks.json_lines import JsonLines
from hvdtrain.rundir.sinks.sink import Metrics, Sink
from hvdtrain.rundir.sinks.tensorboard import TensorBoard
from hvdtrain.settings import LogConfig

Say = Callable[[str], None]

# Name -> class, made with the run's directory and what says a line, and whether the settings ask for it.
SINKS: dict[str, tuple[Callable[[RunDirectory, Say], Sink], Callable[[LogConfig], bool]]] = {
    "jsonl": (JsonLines, lambda log: True),
    "tensorboard": (lambda run, say: TensorBoard(run), lambda log: log.tensorboard),
}

__all__ = ["SINKS", "Console", "JsonLines", "Metrics", "Sink", "TensorBoard", "build_sinks", "describe"]


def build_sinks(run: RunDirectory, log: LogConfig, say: Say) -> list[Sink]:
    """Return the sinks that the settings ask for; nothing is written before their `begin`.

    `say` takes what a person should know.

    Raises:
        ConfigError: a library that one of them needs is not installed.
    """
    return [build(run, say) for build, is_wanted in SINKS.values() if is_wanted(log)]
