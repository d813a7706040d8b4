"""Who is dead or stuck, from what the ranks have reported and when: no sockets, no clock."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from hvdtrain.process.progress import Place

# What a healthy rank may do for longer than a step without a sign of progress: write or read a large checkpoint,
# compile a whole model, and wait for files or the network before the first step and after the last one. Work there
# counts as progress, see `process/busy.py`.
_PATIENCE = {"saving": 6.0, "resume": 6.0, "compilation": 6.0, "start": 3.0, "end": 3.0}
_MOST_SHOWN = 8


class Report(NamedTuple):
    """What is known of a rank."""

    name: str
    """As messages call it."""
    place: Place
    """Where it is, and for how long by now, as last reported."""
    silent_s: float
    """Seconds since it last reported."""


def judge(others: Sequence[Report], here: Report | None, limit_s: float) -> str | None:
    """Return what is wrong, in one sentence, or None.

    Args:
        others: the ranks that report here.
        here: this rank; None where it is not told of all ranks, and cannot say that none makes progress.
        limit_s: seconds without a report, or without progress, after which a rank counts as lost.
    """
    for report in others:
        if report.silent_s > limit_s:
            return (
                f"{report.name} has given no sign of life for {report.silent_s:.0f} s: its process is stopped, or its"
                f" host is gone. It was last seen at {report.place}"
            )
    if here is None:
        return None
    everyone = [here, *others]
    if not all(_is_stuck(report.place, limit_s) for report in everyone):
        return None
    return _describe_stall(everyone, limit_s)


def _is_stuck(place: Place, limit_s: float) -> bool:
    return place.age_s > limit_s * _PATIENCE.get(place.phase, 1.0)


def _describe_stall(everyone: Sequence[Report], limit_s: float) -> str:
    """Name the ranks that do not wait for others, or all where each waits."""
    stuck = [report for report in everyone if report.place.phase != "communication"]
    shown = [f"{name} has been at {place} for {place.age_s:.0f} s" for name, place, _ in stuck or everyone]
    more = f"; and {len(shown) - _MOST_SHOWN} more" if len(shown) > _MOST_SHOWN else ""
    waiting = "; the others wait" if 0 < len(stuck) < len(everyone) else ""
    return (
        f"no rank has made progress for {limit_s:.0f} s (--health.stall-limit):"
        f" {'; '.join(shown[:_MOST_SHOWN])}{more}{waiting}. The stacks are in RUN_DIR/logs"
    )
