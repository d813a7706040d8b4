"""Ranks that are slower than the others for long: named once, with how much, where, and what the likely cause is."""

from __future__ import annotations

import bisect
import socket
import statistics
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from hvdtrain.process.usage import HostCounts, host_counts
from hvdtrain.trainer.component import Component
from hvdtrain.trainer.lasting import INTERVAL_S, Lasting
from hvdtrain.trainer.rank_figures import RankFigures

if TYPE_CHECKING:
    from hvdtrain.trainer.job import Job
    from hvdtrain.trainer.state import Training

# Of a rank that lasts in being slow, the factors of so many intervals are remembered.
_FACTORS = 20
# A rank is slow in an interval when the others wait for it during this share of a step.
_SHARE = 0.1
# A cause is named when it explains this share of what the rank takes longer.
_EXPLAINS = 0.5
_STOLEN = 0.05
# Involuntary switches a second; a thread with a core of its own has a few.
_MANY_SWITCHES = 50.0


class Slow(NamedTuple):
    """A rank that is slow, and in what."""

    rank: int
    factor: float
    """Its own time over the others' median, their parts of the batch being equal; the median of the intervals in which
    it was slow."""
    figures: RankFigures
    """Means of a step in the last interval."""
    others: RankFigures
    """The medians of the others in it."""


class SlowJudge:
    """Says which ranks have become slow, from the figures of all: a function of these alone, alike on every rank.

    Args:
        factor: how many times the others' median a rank's own time must be.
    """

    def __init__(self, factor: float) -> None:
        self._factor = factor
        self._sums: list[list[float]] = []
        self._steps = 0
        self._is_first = True
        self._lasting = Lasting()
        self._factors: dict[int, deque[float]] = {}
        """Of each rank that was slow lately, its factors in the intervals in which it was."""
        self._named: set[int] = set()

    def add(self, ranks: Sequence[RankFigures], steps: int) -> list[Slow]:
        """Take the figures of the ranks, means over so many steps; returns the ranks that are found slow now."""
        rows = [[steps * value for value in figures] for figures in ranks]
        before = self._sums or [[0.0] * len(row) for row in rows]
        self._sums = [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(before, rows, strict=True)]
        self._steps += steps
        means = [RankFigures(*(value / self._steps for value in row)) for row in self._sums]
        if max(figures.step_s for figures in means) * self._steps < INTERVAL_S:
            return []
        self._sums, self._steps = [], 0
        is_first, self._is_first = self._is_first, False
        return [] if is_first or len(means) < 2 else self._judge(means)

    def _judge(self, means: list[RankFigures]) -> list[Slow]:
        own = Medians([figures.own_s for figures in means])
        samples = Medians([figures.samples for figures in means])
        step_s = max(figures.step_s for figures in means)
        slow: dict[int, float] = {}
        for rank, figures in enumerate(means):
            # A rank with more samples has more to do.
            share = figures.samples / usual if (usual := samples.without(figures.samples)) else 1.0
            expected = own.without(figures.own_s) * max(1.0, share)
            is_waited_for = figures.own_s - expected >= _SHARE * step_s
            if expected > 0 and is_waited_for and figures.own_s >= self._factor * expected:
                slow[rank] = figures.own_s / expected
        found = self._lasting.add(slow, len(means))
        before, self._factors = self._factors, {}
        for rank in self._lasting:
            self._factors[rank] = before.get(rank, deque(maxlen=_FACTORS))
            self._factors[rank].extend([slow[rank]] if rank in slow else [])
        new = [rank for rank in found if rank not in self._named]
        self._named.update(new)
        return [Slow(rank, statistics.median(self._factors[rank]), means[rank], _others(means, rank)) for rank in new]


class Medians:
    """Medians of numbers without one of them."""

    def __init__(self, values: Sequence[float]) -> None:
        self._sorted = sorted(values)

    def without(self, value: float) -> float:
        """Return the median of all but one that is equal to `value`."""
        place = bisect.bisect_left(self._sorted, value)
        low, high = ((len(self._sorted) - 1 - odd) // 2 for odd in (1, 0))
        return sum(self._sorted[i + (i >= place)] for i in (low, high)) / 2


def _others(means: list[RankFigures], rank: int) -> RankFigures:
    others = means[:rank] + means[rank + 1 :]
    return RankFigures(*(statistics.median(values) for values in zip(*others, strict=True)))


class Host(NamedTuple):
    """What a rank knows of where it runs."""

    name: str
    counts: HostCounts
    """Since training began."""
    is_gpu: bool = False


def cause_of(slow: Slow, hosts: Sequence[Host]) -> str:
    """Return the likely cause in words, as far as what was measured tells; `hosts` are those of all ranks."""
    own, others, host = slow.figures, slow.others, hosts[slow.rank]
    excess = own.own_s - others.own_s
    if own.data_s - others.data_s >= _EXPLAINS * excess:
        return f"it waits for data, {own.data_s:.2g} s of a step, the others {others.data_s:.2g} s"
    if host.is_gpu:
        return "its GPU computes for longer: another program on it, a lower clock, or more work in its samples"
    idle = (own.own_s - own.cpu_s) - max(0.0, others.own_s - others.cpu_s)
    return _of_the_computing(hosts, host) if idle < _EXPLAINS * excess else _of_the_waiting(own, others, host)


def _of_the_computing(hosts: Sequence[Host], host: Host) -> str:
    """Return the cause where a thread has its processor, and takes longer."""
    elsewhere = [other.counts.throttles for other in hosts if other.name != host.name]
    if host.counts.throttles > 2 * statistics.median(elsewhere or [0]):
        return f"heat: the kernel has slowed its host's processors down {host.counts.throttles:,} times since the start"
    return "it computes for longer, on a processor of its own: a slower one, or more work in its samples"


def _of_the_waiting(own: RankFigures, others: RankFigures, host: Host) -> str:
    """Return the cause where a thread has no processor for long."""
    stolen = host.counts.stolen / max(1, host.counts.ticks)
    steal = f"other virtual machines have its host's processors {stolen:.0%} of the time (steal)"
    if stolen >= max(_STOLEN, _EXPLAINS * (1 - own.cpu_s / own.own_s)):
        return steal
    switches, usual = own.switches / own.step_s, others.switches / others.step_s
    if switches >= max(_MANY_SWITCHES, 2 * usual):
        return (
            f"it shares its core: {switches:,.0f} times a second it must leave it to another process or thread, the"
            f" others {usual:,.0f} times"
        )
    return (
        f"it computes for {max(0.0, own.cpu_s):.2g} s of a step only and sleeps for the rest, in the model, a callback"
        " or the loss: a disk, a network or a lock" + (f"; besides, {steal}" if stolen >= _STOLEN else "")
    )


class SlowRanks(Component):
    """`--health.slow-rank`: names ranks, and hosts, that all others wait for."""

    name = "slow_ranks"

    def __init__(self, job: Job, factor: float) -> None:
        self._job, self._judge = job, SlowJudge(factor)
        self._before, self._step = HostCounts(), 0

    @classmethod
    def of(cls, job: Job) -> SlowRanks | None:
        """Return one where there are other ranks to compare with."""
        factor = job.config.health.slow_rank
        return None if factor is None or job.world.size == 1 else cls(job, factor)

    def attach(self, training: Training) -> None:
        """Note what the host has counted so far."""
        self._before, self._step = host_counts(), training.step

    def metrics(self, training: Training) -> dict[str, float]:
        """Judge the steps since the last line; the figures have travelled with the sums of the metrics. Collective."""
        steps, self._step = max(1, training.step - self._step), training.step
        found = self._judge.add(training.ranks, steps)
        if found:
            world = self._job.world
            own = Host(socket.gethostname(), host_counts().since(self._before), world.device.type == "cuda")
            hosts: list[Host] = world.all_gather_object(own, "slow_ranks.hosts")
            for line in sentences(found, hosts, training.step):
                self._job.log.say(line)
        return {}


def sentences(found: Sequence[Slow], hosts: Sequence[Host], step: int) -> list[str]:
    """Return what to say of the ranks found slow at a step: of a host as a whole where all its ranks are.

    Args:
        found: at least one.
        hosts: of each rank.
        step: optimizer steps completed.
    """
    lines, told = [], set()
    for slow in found:
        host = hosts[slow.rank]
        neighbours = [rank for rank, other in enumerate(hosts) if other.name == host.name]
        of_host = [other for other in found if other.rank in neighbours]
        is_whole = len(of_host) == len(neighbours) > 1
        if is_whole and host.name in told:
            continue
        told.add(host.name)
        worst = max(of_host, key=lambda other: other.factor) if is_whole else slow
        who = f"host {host.name}, all its {len(neighbours)} ranks," if is_whole else f"rank {slow.rank} on {host.name}"
        lines.append(
            f"WARNING: step {step}: {who} is slow, and all others wait: its own part of a step takes"
            f" {worst.figures.own_s:.3g} s, {worst.factor:.2f} times the others'. Likely cause:"
            f" {cause_of(worst, hosts)}"
        )
    return lines
