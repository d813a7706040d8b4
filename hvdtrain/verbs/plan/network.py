"""The time of an all-reduce over any number of ranks, fitted to measured ones. Pure functions.

A reduction takes a latency for each of its rounds and moves each byte a number of times (Thakur, Rabenseifner and Gropp
2005, "Optimization of Collective Communication Operations in MPICH"; for the ring also arXiv:1802.05799):

    T(S, n) = o + a_in R(p) + a_out R(h) + S (W(p) / B_in + W_out / B_out)

with n ranks on h hosts, p on each; R rounds, W(k) = 2 (k - 1) / k. Gloo's ring passes every host with the bytes of all
its ranks (W_out = W(n)) and waits for the receiver's notice (R(k) = 8 (k - 1), Horovod's own negotiation included); MPI
reduces inside a host first (W_out = W(h)) and takes rounds that double (R(k) = 4 ceil(log2 k)).
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from hvdtrain.errors import ConfigError

Controller = Literal["mpi", "gloo"]
# What Ethernet, IP and TCP leave of a wire's bits.
_PAYLOAD = 0.957


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


@dataclass(frozen=True)
class Timing:
    """A measured all-reduce."""

    layout: Layout
    num_bytes: int
    seconds: float
    is_part: bool = False
    """Whether there were ranks outside of the group, which look seldom whether others need them while they are idle."""


@dataclass(frozen=True)
class Network:
    """The fitted model. Seconds, and seconds per byte; those of a kind of link that was not measured are None."""

    controller: Controller
    overhead_s: float
    inside_latency_s: float | None
    inside_byte_s: float | None
    outside_latency_s: float | None
    outside_byte_s: float | None
    error: float
    """Root mean square of the relative errors at the measured points."""
    most_ranks: int
    """Of the measured groups."""

    def seconds(self, num_bytes: float, layout: Layout) -> float:
        """Return the time of an all-reduce of `num_bytes` over the ranks of `layout`; 0 for one rank."""
        return self.latency_part(layout) + self.bandwidth_part(num_bytes, layout) if layout.ranks > 1 else 0.0

    def latency_part(self, layout: Layout) -> float:
        """Return what an empty all-reduce takes."""
        if layout.ranks < 2:
            return 0.0
        values = _row(self.controller, 0.0, layout)
        return self._sum(values)

    def bandwidth_part(self, num_bytes: float, layout: Layout) -> float:
        """Return what the bytes take."""
        values = _row(self.controller, num_bytes, layout)
        return self._sum([0.0, 0.0, values[2], 0.0, values[4]])

    def covers(self, layout: Layout) -> bool:
        """Return whether the links that `layout` uses were measured, or given."""
        inside = layout.per_host < 2 or self.inside_byte_s is not None
        return inside and (layout.hosts < 2 or self.outside_byte_s is not None)

    def _sum(self, values: Sequence[float]) -> float:
        own = (
            *(self.overhead_s, self.inside_latency_s, self.inside_byte_s),
            *(self.outside_latency_s, self.outside_byte_s),
        )
        return sum(value * (factor or 0.0) for value, factor in zip(values, own, strict=True))

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def fit(controller: Controller, timings: Sequence[Timing]) -> Network:
    """Fit the model by least squares of relative errors; no latency and no time per byte is negative.

    Raises:
        ValueError: nothing was measured.
    """
    if not timings:
        raise ValueError("no all-reduce was measured")
    # The last factor is of a wait that groups have and the world has not: fitted, and not part of the model.
    rows = np.array([[*_row(controller, t.num_bytes, t.layout), float(t.is_part)] for t in timings])
    measured = np.array([timing.seconds for timing in timings])
    relative = rows / measured[:, None]
    # Where an overhead and a latency explain as much, it is the latency, which grows with the ranks; where an overhead
    # and a wait of groups do, it is the overhead.
    used = [k for k in (1, 2, 3, 4, 0, 5) if relative[:, k].any()]
    scales = np.abs(relative).max(0)
    best, best_error = np.zeros(6), math.inf
    # Six unknowns at most: every choice of those that are not zero is tried.
    for count in range(1, len(used) + 1):
        for chosen in itertools.combinations(used, count):
            columns = list(chosen)
            answer, *_ = np.linalg.lstsq(relative[:, columns] / scales[columns], np.ones(len(timings)), rcond=None)
            if (answer < 0).any():
                continue
            values = np.zeros(6)
            values[columns] = answer / scales[columns]
            error = float(np.sqrt(np.mean((relative @ values - 1) ** 2)))
            if error < best_error - 1e-12:
                best, best_error = values, error
    has_inside = any(timing.layout.per_host > 1 for timing in timings)
    has_outside = any(timing.layout.hosts > 1 for timing in timings)
    return Network(
        controller,
        float(best[0]),
        float(best[1]) if has_inside else None,
        float(best[2]) if has_inside else None,
        float(best[3]) if has_outside else None,
        float(best[4]) if has_outside else None,
        best_error,
        max(timing.layout.ranks for timing in timings),
    )


def other_network(measured: Network | None, given: str, controller: Controller = "mpi") -> Network:
    """Return a network between hosts of which only the rate and the latency are known, as "25gbit,5us".

    Inside the hosts it is as measured.

    Raises:
        ConfigError: `given` is something else.
    """
    match = re.fullmatch(r"([\d.]+)\s*([kmg])bit(?:/s)?\s*,\s*([\d.]+)\s*(us|ms)", given.strip().lower())
    if match is None:
        raise ConfigError(f"--link {given}: write a rate and a one-way latency, such as 25gbit,5us or 200mbit,1ms")
    rate = float(match[1]) * {"k": 1e3, "m": 1e6, "g": 1e9}[match[2]]
    latency = float(match[3]) * {"us": 1e-6, "ms": 1e-3}[match[4]]
    if rate <= 0:
        raise ConfigError(f"--link {given}: the rate must be greater than 0")
    base = measured or Network(controller, 0.0, None, None, None, None, 0.0, 1)
    return replace(base, outside_latency_s=latency, outside_byte_s=8 / rate / _PAYLOAD)


def _row(controller: Controller, num_bytes: float, layout: Layout) -> list[float]:
    """Return the factors of o, a_in, 1 / B_in, a_out, 1 / B_out."""
    n, h, p = layout.ranks, layout.hosts, layout.per_host
    outside = _share(n) if controller == "gloo" else _share(h)
    return [
        1.0,
        _rounds(controller, p),
        num_bytes * _share(p),
        _rounds(controller, h),
        num_bytes * outside if h > 1 else 0.0,
    ]


def _rounds(controller: Controller, k: int) -> float:
    if k < 2:
        return 0.0
    return 8.0 * (k - 1) if controller == "gloo" else 4.0 * math.ceil(math.log2(k))


def _share(k: int) -> float:
    return 2.0 * (k - 1) / k
