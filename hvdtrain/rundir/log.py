"""Metrics and messages on their way to all sinks of a run, and the log file of each rank.

A message is a line for a person, metrics are figures of a step. Rank 0 has sinks, the others have none.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from hvdtrain.rundir.sinks.console import Console
from hvdtrain.rundir.sinks.sink import Metrics, Sink

logger = logging.getLogger("hvdtrain")


class MetricLog:
    """All sinks of a run. A rank without sinks writes nothing."""

    def __init__(self, console: Console | None, sinks: Sequence[Sink]) -> None:
        self._console = console
        self._sinks = [*sinks] + ([console] if console else [])

    def begin(self, step: int, num_steps: int) -> None:
        """Get every sink ready for the steps after `step`."""
        for sink in self._sinks:
            sink.begin(step, num_steps)

    def say(self, text: str) -> None:
        """Print a line for a person, and add it to this rank's log file."""
        logger.info(text)
        if self._console:
            self._console.say(text)

    def write(self, step: int, metrics: Metrics, event: str | None = None) -> None:
        """Hand the metrics of a step to every sink."""
        for sink in self._sinks:
            sink.write(step, metrics, event)

    def close(self) -> None:
        """Close every sink."""
        for sink in self._sinks:
            sink.close()


def open_rank_log(path: Path) -> logging.Handler:
    """Send this rank's log messages to its own file; returns the handler, to be removed with `close_rank_log`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    return handler


def close_rank_log(handler: logging.Handler) -> None:
    """Undo `open_rank_log`."""
    logger.removeHandler(handler)
    handler.close()
