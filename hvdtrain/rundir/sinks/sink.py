"""What every sink can do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

Metrics = Mapping[str, float]
"""By name, `group/name` with its unit: `train/loss`, `time/step_s`, `throughput/tokens_per_s`."""


class Sink(Protocol):
    """A place that metrics go to."""

    def begin(self, step: int, num_steps: int) -> None:
        """Get ready for the steps after `step`, up to `num_steps`. Called once, when nothing is refused any more."""
        ...

    def write(self, step: int, metrics: Metrics, event: str | None) -> None:
        """Take the metrics of a step (in optimizer steps completed) and perhaps what happened then."""
        ...

    def close(self) -> None:
        """Finish."""
        ...
