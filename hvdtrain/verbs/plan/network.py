"""The time of a collective over any number of ranks, fitted to measured ones. Pure functions.

A reduction takes a latency for each of its rounds and moves each byte a number of times (Thakur, Rabenseifner and Gropp
2005, "Optimization of Collective Communication Operations in MPICH"; for the ring also arXiv:1802.05799):

    T(S, n) = o + a_in R(p) + a_out R(h) + S (W_in / B_in + W_out / B_out)

with n ranks on h hosts, p on each; R rounds, W how often a byte passes: `kinds.py`. Gloo's ring passes every host with
the bytes of all its ranks and waits for the receiver's notice (R(k) = 8 (k - 1), Horovod's own negotiation included);
MPI reduces inside a host first and takes rounds that double (R(k) = 4 log2 k; more where ranks are folded first).

Other collectives have rounds and bytes of their own over the same links; two factors, of the latency and of the bytes,
are measured for each (`Pace`).
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from hvdtrain.errors import ConfigError
from hvdtrain.settings.units import shortened
from hvdtrain.verbs.plan.kinds import Controller, Kinds, Layout, factors

__all__ = ["Controller", "Layout", "Network", "Pace", "Timing", "fit", "other_network", "paced"]

_NUMBER = r"[0-9]+(?:\.[0-9]*)?|\.[0-9]+"
# What Ethernet, IP and TCP leave of a wire's bits.
_PAYLOAD = 0.957
# What another collective's latency and bytes may be to those that the all-reduces tell of.
_LEAST, _MOST = 0.2, 5.0
# Of --link: bits a second, and seconds. Beyond these it is a slip, and tables would be wider than any terminal.
_SLOWEST, _FASTEST, _LONGEST_S = 1e3, 1e15, 60.0


@dataclass(frozen=True)
class Timing:
    """A measured all-reduce."""

    layout: Layout
    num_bytes: int
    seconds: float
    is_part: bool = False
    """Whether there were ranks outside of the group, which look seldom whether others need them while they are idle."""


@dataclass(frozen=True)
class Pace:
    """What a collective's times are to those that all-reduces tell of."""

    latency: float = 1.0
    bandwidth: float = 1.0


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
    paces: Mapping[Kinds, Pace] = field(default_factory=dict)
    """Of the collectives that were measured besides all-reduces."""

    def seconds(self, num_bytes: float, layout: Layout, way: Kinds = "all_reduce") -> float:
        """Return the time of a collective of `num_bytes` over the ranks of `layout`; 0 for one rank."""
        if layout.ranks < 2:
            return 0.0
        return self.latency_part(layout, way) + self.bandwidth_part(num_bytes, layout, way)

    def latency_part(self, layout: Layout, way: Kinds = "all_reduce") -> float:
        """Return what an empty collective takes."""
        if layout.ranks < 2:
            return 0.0
        _, inside, _, outside, _ = factors(way, self.controller, 0.0, layout)
        pace = self.paces.get(way, Pace())
        return self.overhead_s + pace.latency * self._sum([0.0, inside, 0.0, outside, 0.0])

    def bandwidth_part(self, num_bytes: float, layout: Layout, way: Kinds = "all_reduce") -> float:
        """Return what the bytes take."""
        values = factors(way, self.controller, num_bytes, layout)
        return self.paces.get(way, Pace()).bandwidth * self._sum([0.0, 0.0, values[2], 0.0, values[4]])

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
    rows = np.array([[*factors("all_reduce", controller, t.num_bytes, t.layout), float(t.is_part)] for t in timings])
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


def paced(network: Network, way: Kinds, timings: Sequence[Timing]) -> Network:
    """Return the network with what measured collectives of another kind, of a few sizes, tell of their pace."""
    latency, bandwidth = [], []
    rows = []
    for timing in timings:
        latency.append(network.latency_part(timing.layout, way) - network.overhead_s)
        bandwidth.append(network.bandwidth_part(timing.num_bytes, timing.layout, way))
        rows.append(max(timing.seconds - network.overhead_s, 0.0))
    weights = 1 / np.array([timing.seconds for timing in timings])
    terms = np.array([latency, bandwidth]).T * weights[:, None]
    answer, *_ = np.linalg.lstsq(terms, np.array(rows) * weights, rcond=None)
    pace = Pace(*(min(_MOST, max(_LEAST, float(value))) if value else 1.0 for value in answer))
    return replace(network, paces={**network.paces, way: pace})


def other_network(measured: Network | None, given: str, controller: Controller = "mpi") -> Network:
    """Return a network between hosts of which only the rate and the latency are known, as "25gbit,5us".

    Inside the hosts it is as measured.

    Raises:
        ConfigError: `given` is something else.
    """
    match = re.fullmatch(rf"({_NUMBER})\s*([kmg])bit(?:/s)?\s*,\s*({_NUMBER})\s*(us|ms)", given.strip().lower())
    if match is None:
        raise ConfigError(
            f"--link {shortened(given)}: write a rate and a one-way latency, such as 25gbit,5us or 200mbit,1ms"
        )
    rate = float(match[1]) * {"k": 1e3, "m": 1e6, "g": 1e9}[match[2]]
    latency = float(match[3]) * {"us": 1e-6, "ms": 1e-3}[match[4]]
    if not (_SLOWEST <= rate <= _FASTEST and latency <= _LONGEST_S):
        raise ConfigError(
            f"--link {shortened(given)}: the rate must be from 1kbit to 1000000gbit, and the latency at most 60000ms"
        )
    base = measured or Network(controller, 0.0, None, None, None, None, 0.0, 1)
    return replace(base, outside_latency_s=latency, outside_byte_s=8 / rate / _PAYLOAD)
