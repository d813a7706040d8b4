"""Which checkpoints are kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Health = Literal["good", "doubtful", "damaged", "unknown"]
"""doubtful: saved after skipped steps, or of weights that are not finite. unknown: it cannot be read just now."""


@dataclass(frozen=True)
class Retention:
    """Which checkpoints are kept besides the newest and the best: the last few, and every so many steps one."""

    keep_last: int | None = None
    keep_every: int | None = None


def kept_steps(health: Mapping[int, Health], newest: int, retention: Retention) -> set[int]:
    """Return the steps whose checkpoints stay, of those in `health`.

    Only good ones count as the last few: while steps are skipped, checkpoints of exploded weights come beside the
    healthy ones, not in their place. Those of later steps than the newest are left alone: a run that has fallen back
    from damaged checkpoints has them before it.

    Args:
        health: of each checkpoint, by step.
        newest: step of the one that was just saved.
        retention: what the settings say.
    """
    if retention.keep_last is None:
        return set(health)
    good = sorted(step for step, state in health.items() if state == "good" and step <= newest)
    last_good = good[-1] if good else -1
    doubtful = sorted(step for step, state in health.items() if state == "doubtful" and last_good < step <= newest)
    kept = {newest, *good[-retention.keep_last :], *doubtful[-retention.keep_last :]}
    kept |= {step for step, state in health.items() if step > newest or state == "unknown"}
    if retention.keep_every is not None:
        kept |= {step for step in health if step % retention.keep_every == 0}
    return kept & health.keys()
