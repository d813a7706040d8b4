"""The sink of people: standard output of rank 0."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
import time
from typing import TextIO

from hvdtrain.errors import reason_of
from hvdtrain.rundir.sinks.bar import Bar
from hvdtrain.rundir.sinks.sink import Metrics
from hvdtrain.settings.units import duration

logger = logging.getLogger("hvdtrain")


class Console:
    """Shows metrics to a person: a progress bar on a terminal, elsewhere plain lines at a humane pace.

    Lines that cannot be written, because standard output goes to a full disk, wait; what is printed after it was closed
    is in the log of rank 0 only.

    Args:
        is_terminal: whether `stream` is one.
        stream: None for standard output.
    """

    seconds_between_lines = 5.0

    def __init__(self, is_terminal: bool, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._is_terminal = is_terminal
        self._bar: Bar | None = None
        self._num_steps = 0
        self._last_line = float("-inf")
        self._waiting = b""
        self._has_warned = False

    def begin(self, step: int, num_steps: int) -> None:
        """Start showing progress from `step` to `num_steps`."""
        self._num_steps = num_steps
        if self._is_terminal:
            self._bar = Bar(step, num_steps, self._stream)

    def say(self, text: str) -> None:
        """Print a line, in one write: several ranks may share the terminal."""
        try:
            if self._bar is not None:
                self._bar.clear()
            self._print(text + "\n")
        except (OSError, ValueError) as error:  # ValueError: a program has closed the file
            self._give_up_if_closed(error)

    def write(self, step: int, metrics: Metrics, event: str | None) -> None:
        """Show the metrics of a step; training lines that come too fast are left out, evaluation never is."""
        is_evaluation = any(name.startswith("val/") for name in metrics)
        text = describe(metrics)
        if event:
            self._remove_bar()
        if self._bar is not None and not is_evaluation:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.n = step
            try:
                self._bar.refresh()
            except (OSError, ValueError) as error:
                self._give_up_if_closed(error)
            return
        now = time.monotonic()
        if is_evaluation or event or now - self._last_line >= self.seconds_between_lines or step == self._num_steps:
            if not is_evaluation:
                self._last_line = now
            self.say(f"step {step:>{len(str(self._num_steps))}}/{self._num_steps}  {text}")

    def advance(self, step: int) -> None:
        """Move the bar; it is drawn some times a second at most."""
        if self._bar is not None:
            try:
                self._bar.update(step - self._bar.n)
            except (OSError, ValueError) as error:
                self._give_up_if_closed(error)

    def close(self) -> None:
        """Remove the progress bar, and print what is waiting."""
        self._remove_bar()
        try:
            self._print("")
        except (OSError, ValueError):
            _forget(self._stream)

    def _remove_bar(self) -> None:
        bar, self._bar = self._bar, None
        if bar is not None:
            with contextlib.suppress(OSError, ValueError):
                bar.close()

    def _print(self, text: str) -> None:
        """Write without a buffer of Python's, which would lose or repeat what could not be written."""
        descriptor = _descriptor_of(self._stream)
        if descriptor is None:
            self._stream.write(text)
            self._stream.flush()
            return
        self._waiting += text.encode(self._stream.encoding or "utf-8", "replace")
        self._stream.flush()
        while self._waiting:
            written = os.write(descriptor, self._waiting)
            self._waiting = self._waiting[written:]

    def _give_up_if_closed(self, error: Exception) -> None:
        """Print no more where nobody can read it; a disk that is full may have room again."""
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EAGAIN, errno.EFBIG):
            if not self._has_warned:
                self._has_warned = True
                logger.warning("standard output cannot be written (%s): its lines wait", reason_of(error))
            return
        logger.warning("standard output is closed (%s): from now on this file has what would be printed", error)
        self._waiting, self._bar = b"", None
        _forget(self._stream)


def _descriptor_of(stream: TextIO) -> int | None:
    """Return the stream's file descriptor; None for one in memory, as notebooks and tests have."""
    try:
        return stream.fileno()
    except (OSError, ValueError, AttributeError):
        return None


def _forget(stream: TextIO) -> None:
    """Send what is written to a stream nowhere: Python would fail at its exit with what it could not flush."""
    descriptor = _descriptor_of(stream)
    if descriptor is not None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, descriptor)
        os.close(nowhere)


def describe(metrics: Metrics) -> str:
    """Return metrics as a person reads them: `loss 2.104  lr 1.00e-03  12,345 tokens/s  3m20s left`."""
    parts = []
    for name, value in metrics.items():
        group, _, short = name.partition("/")
        if name == "throughput/mfu":
            parts.append(f"MFU {value:.1%}")
        elif group == "throughput":
            number = f"{value:,.0f}" if abs(value) < 1e15 else f"{value:.3g}"
            parts.append(f"{number} {short.removesuffix('_per_s')}/s")
        elif name == "train/lr":
            parts.append(f"lr {value:.2e}")
        elif name == "train/epoch":
            parts.append(f"epoch {value:.3g}")
        elif name == "time/left_s":
            parts.append(f"{duration(value)} left")
        elif group in ("train", "val"):
            label = short.replace("_", " ")
            parts.append(f"{'held-out ' if group == 'val' else ''}{label} {value:.4g}")
    return "  ".join(parts)
