"""What a measured step of all ranks tells of the predicted one. Pure functions."""

from __future__ import annotations

import dataclasses
import math

from hvdtrain.verbs.plan.facts import Facts, predict


def calibrated(facts: Facts, size: int, step_s: float) -> Facts:
    """Return the facts with a real step of all `size` ranks, and what it tells of the network's pace and interference.

    Args:
        facts: what was measured of single ranks and of the network.
        size: ranks, at least two.
        step_s: seconds of a step with communication.
    """
    measured = {**facts.alone_measured_s, size: step_s}
    facts = dataclasses.replace(facts, measured_steps_s=measured)
    facts = dataclasses.replace(facts, pace=_pace(facts, size))
    return dataclasses.replace(facts, interference=_interference(facts, size))


def _interference(facts: Facts, size: int) -> float:
    """Return the share of hidden communication that a real step is longer than predicted by, between 0 and 1."""
    free = predict(facts, size)
    all_of_it = predict(dataclasses.replace(facts, interference=1.0), size)
    hidden = all_of_it.total_s - free.total_s
    if hidden <= 0.01 * free.total_s:
        return 0.0
    return min(1.0, max(0.0, (facts.measured_steps_s[size] - free.total_s) / hidden))


def _pace(facts: Facts, size: int) -> float:
    """Return the factor of the network's times that makes the predicted step of all ranks the measured one.

    One all-reduce after the other, as it was measured, is not quite what a step does. Where no communication is waited
    for, nothing is known of it.
    """
    low, high = 0.5, 2.0
    wanted = facts.measured_steps_s[size]
    if predict(facts, size).exposed_s < 0.05 * wanted:
        return 1.0
    for _ in range(30):
        middle = math.sqrt(low * high)
        if predict(dataclasses.replace(facts, pace=middle), size).total_s < wanted:
            low = middle
        else:
            high = middle
    return math.sqrt(low * high)
