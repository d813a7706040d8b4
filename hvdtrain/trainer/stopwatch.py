"""How long training takes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Measures the seconds spent in training, without evaluation and saving; runs from the start.

    Args:
        step: optimizer steps completed when it starts.
    """

    def __init__(self, step: int = 0) -> None:
        self._started = time.perf_counter()
        self._seconds = 0.0
        self._running = True
        self._lap_step, self._lap_seconds = step, 0.0

    @property
    def seconds(self) -> float:
        """Return the seconds measured so far."""
        return self._seconds + (time.perf_counter() - self._started if self._running else 0.0)

    def lap(self, step: int) -> float:
        """Return the mean seconds a step since the last lap, up to `step` completed ones."""
        seconds = self.seconds
        mean = (seconds - self._lap_seconds) / max(1, step - self._lap_step)
        self._lap_step, self._lap_seconds = step, seconds
        return mean

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count what happens inside."""
        self._seconds, self._running = self.seconds, False
        try:
            yield
        finally:
            self._started, self._running = time.perf_counter(), True
