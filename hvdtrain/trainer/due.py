"""What is due after a step: alike on all ranks, without asking them at every step."""

from __future__ import annotations

import functools
import math

from hvdtrain.settings.intervals import Every, Interval, parse_every
from hvdtrain.trainer.job import Job


def is_due(job: Job, step: int, every: Every | None) -> bool:
    """Tell whether something that happens every so many steps or epochs happens after `step` completed steps."""
    return every is not None and _interval(every).is_due(step, job.order.steps_per_epoch)


def times_due(job: Job, every: Every | None) -> int:
    """Return how often something happens in a run that happens after its last step, too; None: only then."""
    return 1 if every is None else 1 + _interval(every).times(job.num_steps - 1, job.order.steps_per_epoch)


@functools.lru_cache(maxsize=64)
def _interval(every: Every) -> Interval:
    """Return what is asked for after every step."""
    return parse_every("every", every)


class LogDue:
    """Says which steps end with a line of metrics.

    Where lines go by seconds, each says after which step the next one comes, from how long the slowest
    rank's steps take.
    """

    def __init__(self, job: Job, step: int) -> None:
        self._job = job
        self._interval = parse_every("log.every", job.config.log.every, seconds=True)
        self._next: float = step + 1

    def after(self, step: int) -> bool:
        """Tell whether there is a line after `step` completed steps."""
        if self._interval.unit == "seconds":
            is_due = step >= self._next
            if is_due:
                self._next = math.inf  # until the line is there
            return is_due
        return self._interval.is_due(step, self._job.order.steps_per_epoch)

    def note(self, step: int, step_s: float) -> None:
        """Take the seconds of a step of the slowest rank before a line that has just been written; alike on all."""
        if self._interval.unit == "seconds":
            self._next = step + max(1, round(self._interval.number / max(step_s, 1e-9)))
