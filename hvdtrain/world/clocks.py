"""How far the clocks of the ranks are apart."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hvdtrain.world.world import World

_ROUNDS = 30


@dataclass(frozen=True)
class Offset:
    """What is added to a rank's clock to have rank 0's, in nanoseconds."""

    ns: int
    uncertainty_ns: int
    """The true offset is at most so far away: it follows from what happened before what, not from an average."""


def clock_offsets(world: World) -> list[Offset]:
    """Return the offsets of the ranks' `time.perf_counter_ns`, which each host counts from a moment of its own.

    Collective: some small all-reduces.
    """
    moments = []
    for round_ in range(_ROUNDS):
        entered = time.perf_counter_ns()
        world.all_reduce(torch.zeros(1, device=world.device), "sum", f"clocks.{round_}").item()
        moments.append((entered, time.perf_counter_ns()))
    of_ranks = world.all_gather_object(moments, "clocks")
    return [offset_between(of_ranks[0], moments) for moments in of_ranks]


def offset_between(here: Sequence[tuple[int, int]], there: Sequence[tuple[int, int]]) -> Offset:
    """Return what to add to the clock of `there`.

    Nobody leaves an all-reduce before everybody has entered it: so the moment at which one has entered lies before the
    moment at which the other has left. Each round gives a bound on either side, and the tightest count.

    Args:
        here: when a rank has entered and left each round, in nanoseconds of its clock.
        there: the same of the other rank.
    """
    pairs = [*zip(here, there, strict=True)]
    least = max(entered - left for (entered, _), (_, left) in pairs)
    most = min(left - entered for (_, left), (entered, _) in pairs)
    return Offset((least + most) // 2, abs(most - least) // 2)
