"""What a collective costs a link: rounds that wait for each other, and how often its bytes pass. Pure functions.

With n ranks on h hosts, p on each, `S` the bytes that one rank hands over, and what Horovod's negotiation takes:

| | rounds, MPI | rounds, Gloo | bytes over a host's link |
|---|---|---|---|
| negotiation | two reductions of bits, by recursive doubling | two rings | |
| all-reduce | halving and doubling (Rabenseifner) | ring, each step with a notice | W S |
| all-gather | ring | ring | (n - 1) S |
| all-to-all | all at once | all at once | p (n - p) / n S |
| shares | all-to-all of the numbers, all-gather of the sums | the same | the sum of both |

A number of ranks that is no power of two is folded by MPI before it halves: some ranks hand all they have to a
neighbour, exchange halves for that, and are given the whole result in the end (Thakur, Rabenseifner and Gropp 2005,
section 4.4). That is 2 S more over the slowest link, and rounds more. Gloo's ring does not care.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from hvdtrain.world import Message

Controller = Literal["mpi", "gloo"]
Kinds = Literal["all_reduce", "all_gather", "all_to_all", "shares"]


@dataclass(frozen=True)
class Layout:
    """Ranks of a group: how many, and on how many hosts."""

    ranks: int
    hosts: int

    @property
    def per_host(self) -> int:
        """Return the most ranks on a host."""
        return -(-self.ranks // self.hosts)

    @staticmethod
    def of(ranks: int, ranks_per_host: int) -> Layout:
        """Return the layout of so many ranks that fill host after host."""
        return Layout(ranks, max(1, -(-ranks // ranks_per_host)))


def way_of(message: Message) -> Kinds:
    """Return how a message travels: bfloat16 is added by the ranks, each its share of the numbers."""
    return "shares" if message.kind == "all_reduce" and message.dtype == torch.bfloat16 else message.kind


def is_folded(controller: Controller, layout: Layout) -> bool:
    """Return whether MPI folds the ranks to a power of two before it reduces."""
    return controller == "mpi" and not _is_power(layout.ranks)


def factors(way: Kinds, controller: Controller, num_bytes: float, layout: Layout) -> list[float]:
    """Return the factors of o, a_in, 1 / B_in, a_out, 1 / B_out: see `network.py`."""
    inside, outside = _SHARES[way](controller, layout)
    return [
        1.0,
        _rounds(way, controller, layout.per_host),
        num_bytes * inside if layout.per_host > 1 else 0.0,
        _rounds(way, controller, layout.hosts),
        num_bytes * outside if layout.hosts > 1 else 0.0,
    ]


def _rounds(way: Kinds, controller: Controller, k: int) -> float:
    if k < 2:
        return 0.0
    steps = k - 1
    if controller == "gloo":
        own = {"all_reduce": 4.0 * steps, "all_gather": 2.0 * steps, "all_to_all": 4.0, "shares": 4.0 + 2.0 * steps}
        return 4.0 * steps + own[way]
    doublings, folds = math.floor(math.log2(k)), float(not _is_power(k))
    halving = 2.0 * doublings + 3 * folds
    own = {"all_reduce": halving, "all_gather": 1.0 * steps, "all_to_all": 2.0, "shares": 2.0 + steps}
    return 2.0 * doublings + 4 * folds + own[way]


def _of_all_reduce(controller: Controller, layout: Layout) -> tuple[float, float]:
    n, h, p = layout.ranks, layout.hosts, layout.per_host
    if controller == "gloo":
        return _ring(p), _ring(n)
    if _is_power(n):
        return _ring(p), _ring(h)
    power = 1 << (n.bit_length() - 1)
    if h == 1:
        return _ring(power) + 2.0, 0.0
    if p == 1:
        return 0.0, _ring(power) + 2.0
    return _ring(p) + 2.0, _ring(power)  # neighbours are on one host


def _of_all_gather(controller: Controller, layout: Layout) -> tuple[float, float]:
    return layout.ranks - 1.0, layout.ranks - 1.0


def _of_all_to_all(controller: Controller, layout: Layout) -> tuple[float, float]:
    n, p = layout.ranks, layout.per_host
    return (p - 1) / n, p * max(0, n - p) / n


def _of_shares(controller: Controller, layout: Layout) -> tuple[float, float]:
    inside, outside = _of_all_to_all(controller, layout)
    gathered = (layout.ranks - 1) / layout.ranks
    return inside + gathered, outside + gathered


_SHARES = {
    "all_reduce": _of_all_reduce,
    "all_gather": _of_all_gather,
    "all_to_all": _of_all_to_all,
    "shares": _of_shares,
}


def _ring(k: int) -> float:
    return 2.0 * (k - 1) / k


def _is_power(k: int) -> bool:
    return k & (k - 1) == 0
