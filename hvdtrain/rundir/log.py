"""Metrics and messages on their way to all sinks of a run, and the log file of each rank.

A message is a line for a person, metrics are figures of a step. Rank 0 has sinks, the others have none. No disk that is
full and no output that was closed ends a run.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hvdtrain.errors import reason_of
from hvdtrain.process.output import tell
from hvdtrain.rundir.patient_file import PatientFile
from hvdtrain.rundir.sinks.background import Background
from hvdtrain.rundir.sinks.console import Console
from hvdtrain.rundir.sinks.sink import Metrics, Samples, Sink, takes_samples

logger = logging.getLogger("hvdtrain")


class MetricLog:
    """All sinks of a run. A rank without sinks writes nothing.

    Args:
        console: for people; None on ranks that are silent.
        sinks: for programs.
    """

    def __init__(self, console: Console | None, sinks: Sequence[Sink]) -> None:
        self._console = console
        self._sinks: list[Sink] = [*sinks] + ([console] if console else [])
        self._failing: set[Sink] = set()

    def begin(self, step: int, num_steps: int) -> None:
        """Get every sink ready for the steps after `step`."""
        for sink in self._sinks:
            with self._patience_with(sink):
                sink.begin(step, num_steps)

    def say(self, text: str) -> None:
        """Print a line for a person, and add it to this rank's log file."""
        logger.info(text)
        if self._console:
            self._console.say(text)

    def write(self, step: int, metrics: Metrics, event: str | None = None) -> None:
        """Hand the metrics of a step to every sink."""
        for sink in self._sinks:
            with self._patience_with(sink):
                sink.write(step, metrics, event)

    def show(self, step: int, make: Callable[[], Samples]) -> None:
        """Hand what the model makes of held-out data to every sink that shows it; `make` is called if there is one."""
        takers: list[Any] = [sink for sink in self._sinks if takes_samples(sink)]
        samples = make() if takers else {}
        for sink in takers if samples else ():
            with self._patience_with(sink):
                sink.show(step, samples)

    def advance(self, step: int) -> None:
        """Move the progress bar after a step without a line of metrics."""
        if self._console:
            self._console.advance(step)

    def close(self) -> None:
        """Close every sink; those that take their time do so side by side."""
        for sink in self._sinks:
            if isinstance(sink, Background):
                sink.start_closing()
        for sink in self._sinks:
            with self._patience_with(sink):
                sink.close()

    @contextlib.contextmanager
    def _patience_with(self, sink: Sink) -> Iterator[None]:
        """Say once that a sink cannot write, and once that it can again; training goes on."""
        name = type(sink).__name__
        try:
            yield
        except OSError as error:
            if sink not in self._failing:
                self._failing.add(sink)
                reason = reason_of(error)
                self.say(f"WARNING: metrics cannot be written by {name} ({reason}); training goes on, and they wait")
        else:
            if sink in self._failing:
                self._failing.discard(sink)
                self.say(f"metrics are written by {name} again")


class _RankLog(logging.Handler):
    """A log file that waits where the disk is full."""

    def __init__(self, file: PatientFile) -> None:
        super().__init__()
        self._file = file
        self._has_warned = False

    def emit(self, record: logging.LogRecord) -> None:
        """Add a line."""
        try:
            self._file.append(self.format(record) + "\n")
        except OSError as error:
            if not self._has_warned:
                self._has_warned = True
                tell(f"hvdtrain: a log file cannot be written ({reason_of(error)}); its lines wait")

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()


def open_rank_log(path: Path) -> logging.Handler:
    """Send this rank's log messages to its own file; returns the handler, to be removed with `close_rank_log`.

    Raises:
        OSError: it cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = PatientFile(path)
    file.append("")
    handler = _RankLog(file)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    return handler


def close_rank_log(handler: logging.Handler) -> None:
    """Undo `open_rank_log`."""
    logger.removeHandler(handler)
    handler.close()
