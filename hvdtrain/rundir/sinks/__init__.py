"""Where metrics go. A new sink is a file beside these and a line in `SINKS`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hvdtrain.rundir.directory import RunDirectory
from hvdtrain.rundir.sinks.background import Background
from hvdtrain.rundir.sinks.console import Console, describe
from hvdtrain.rundir.sinks.json_lines import JsonLines
from hvdtrain.rundir.sinks.mlflow import MLflow
from hvdtrain.rundir.sinks.sink import Metrics, Samples, Sink, check_sinks
from hvdtrain.rundir.sinks.tensorboard import TensorBoard
from hvdtrain.rundir.sinks.wandb import WandB
from hvdtrain.settings import LogConfig

Say = Callable[[str], None]

# Name -> class, made with the run's directory and the settings of the log, and whether these ask for it.
SINKS: dict[str, tuple[Callable[[RunDirectory, LogConfig], Sink], Callable[[LogConfig], bool]]] = {
    "tensorboard": (lambda run, log: TensorBoard(run), lambda log: log.tensorboard),
    "wandb": (lambda run, log: WandB(run, log.project), lambda log: log.wandb),
    "mlflow": (lambda run, log: MLflow(run, log.project), lambda log: log.mlflow),
}

__all__ = [
    "SINKS",
    "Background",
    "Console",
    "JsonLines",
    "MLflow",
    "Metrics",
    "Samples",
    "Sink",
    "TensorBoard",
    "WandB",
    "build_sinks",
    "describe",
]


def build_sinks(run: RunDirectory, log: LogConfig, say: Say, own: Sequence[Sink] = ()) -> list[Sink]:
    """Return the sinks that the settings ask for and a recipe's own; nothing is written before their `begin`.

    `metrics.jsonl` is written at once: whoever follows a run reads it. All others are called in threads of their own.

    Args:
        run: its directory.
        log: the settings.
        say: takes what a person should know.
        own: `Task.sinks`.

    Raises:
        ConfigError: a library that one of them needs is not installed, or one of `own` is no sink.
    """
    check_sinks(own)
    trackers = [build(run, log) for build, is_wanted in SINKS.values() if is_wanted(log)]
    return [JsonLines(run, say), *(Background(sink, say) for sink in (*trackers, *own))]
