"""How long training takes, and where the time of a step goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from hvdtrain.process.progress import Phase
from hvdtrain.process.usage import involuntary_switches
from hvdtrain.world import World

PARTS: dict[str, tuple[Phase, ...]] = {
    "data": ("data",),
    "compute": ("forward", "backward", "compilation"),
    "communication": ("communication",),
    "optimizer": ("update",),
}
"""What a step's time is told of, by the phases that the loop notes; what is left is "other"."""
OTHER = "other"

Counts = Mapping[str, float]


def counts_of(world: World) -> dict[str, float]:
    """Return what is counted of this rank so far: seconds by part, processor time, switches.

    To be called by the thread that trains.
    """
    spent = world.progress.spent()
    counts = {part: sum(spent[phase] for phase in phases) for part, phases in PARTS.items()}
    return {
        **counts,
        "cpu": time.thread_time(),
        "switches": float(involuntary_switches()),
    }


@dataclass(frozen=True)
class Lap:
    """Means over some steps, without evaluation and saving, on this rank."""

    step_s: float
    counts: Counts
    """Of a step, as `counts_of` has them."""

    @property
    def split(self) -> dict[str, float]:
        """Return the seconds of a step by part, `PARTS` and "other": together `step_s`."""
        parts = {part: max(0.0, self.counts.get(part, 0.0)) for part in PARTS}
        known = sum(parts.values())
        if known > self.step_s:  # the parts of a GPU's steps are those of some of them
            parts = {part: seconds * self.step_s / known for part, seconds in parts.items()}
        return {**parts, OTHER: max(0.0, self.step_s - known)}


class Stopwatch:
    """Measures the seconds spent in training, without evaluation and saving; runs from the start.

    Args:
        step: optimizer steps completed when it starts.
        count: returns what else is counted, which only grows.
    """

    def __init__(self, step: int = 0, count: Callable[[], Counts] = lambda: {}) -> None:
        self._started = time.perf_counter()
        self._seconds = 0.0
        self._running = True
        self._lap_step, self._lap_seconds = step, 0.0
        self._count = count
        self._lap_counts = count()

    @property
    def seconds(self) -> float:
        """Return the seconds measured so far."""
        return self._seconds + (time.perf_counter() - self._started if self._running else 0.0)

    def lap(self, step: int) -> Lap:
        """Return the means of the steps since the last lap, up to `step` completed ones."""
        seconds, counts, num = self.seconds, self._count(), max(1, step - self._lap_step)
        means = {name: (count - self._lap_counts.get(name, 0.0)) / num for name, count in counts.items()}
        lap = Lap((seconds - self._lap_seconds) / num, means)
        self._lap_step, self._lap_seconds, self._lap_counts = step, seconds, counts
        return lap

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count what happens inside."""
        self._seconds, self._running = self.seconds, False
        before = self._count()
        try:
            yield
        finally:
            after = self._count()
            self._lap_counts = {
                name: count + after[name] - before.get(name, 0.0) for name, count in self._lap_counts.items()
            }
            self._started, self._running = time.perf_counter(), True
