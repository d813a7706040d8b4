"""What is usual of a figure, from its last values, so that a few odd ones change nothing: median and MAD."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence

# The median absolute deviation of a normal distribution is its standard deviation over this.
_NORMAL = 1.4826


class RunningScale:
    """The last values of a figure, and above what one is a spike.

    Args:
        window: how many values are remembered.
        least: of fewer nothing is said.
        deviations: robust standard deviations above the median that are still usual.
        every: values between two computations of the limit.
    """

    def __init__(self, window: int, least: int, deviations: float, every: int = 1) -> None:
        self._values: deque[float] = deque(maxlen=window)
        self._least, self._deviations, self._every = least, deviations, every
        self._count = 0
        self.median = math.nan
        self.deviation = math.nan
        """Robust standard deviation."""

    def add(self, value: float) -> None:
        """Take the next value."""
        self._values.append(value)
        self._count += 1
        if self._count >= self._least and self._count % self._every == 0:
            self.median = statistics.median(self._values)
            self.deviation = _NORMAL * statistics.median(abs(value - self.median) for value in self._values)

    def limit(self, margin: float) -> float:
        """Return what is usual at most, at least `margin` above the median; infinite while too little is known."""
        if math.isnan(self.median):
            return math.inf
        return self.median + max(self._deviations * self.deviation, margin)

    def forget(self) -> None:
        """Begin anew: what was usual is no more."""
        self._values.clear()
        self._count, self.median, self.deviation = 0, math.nan, math.nan

    def state(self) -> dict[str, float | list[float]]:
        """Return all that it knows, as plain values."""
        return {
            "values": list(self._values),
            "count": float(self._count),
            "median": self.median,
            "deviation": self.deviation,
        }

    def load(self, values: Sequence[float], count: float, median: float, deviation: float) -> None:
        """Take what `state` returned."""
        self._values.clear()
        self._values.extend(values)
        self._count, self.median, self.deviation = int(count), median, deviation
