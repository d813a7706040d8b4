"""How many workers: predictions for 1, 2, 4, ... from what was measured, and the recommendation. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from hvdtrain.optim.noise import NoiseScale, steps_ratio
from hvdtrain.verbs.plan.network import Layout, Network
from hvdtrain.verbs.plan.step import Bucket, Compute, StepTime, step_time

# 1.64 standard deviations hold 90 % of a normal distribution.
_NINETY_PERCENT = 1.64
# What the model of the network is taken to be off by with each doubling of the ranks beyond those measured.
_BEYOND = 0.08


@dataclass(frozen=True)
class Facts:
    """Everything that a plan is made of; what `plan.json` holds."""

    recipe: str
    unit: str
    """What is counted, in the plural: tokens or samples."""
    units_per_sample: float
    micro_batch_size: int
    accum_steps: int
    ranks_per_host: int
    """Of the hosts that are planned for."""
    alone: Compute
    """A step of one rank while the others of its host wait."""
    together: Compute
    """A step of a rank while all ranks of its host compute, the slowest's."""
    together_ranks: int
    """Ranks of a host that did."""
    spread: float
    """Interquartile range of the steps as a share of their median."""
    buckets: Sequence[Bucket]
    network: Network | None
    fp16_network: Network | None
    noise: NoiseScale | None
    interference: float = 0.0
    pace: float = 1.0
    """What the network's times in a step are to those of single all-reduces."""
    measured_steps_s: Mapping[int, float] = field(default_factory=dict)
    """Real steps with communication, by number of ranks."""
    slowest: str = ""
    """Which rank is slower than the others, and by how much; empty if none is."""
    steps_to_target: int | None = None
    """Steps of the recipe at its own global batch."""
    recipe_batch: int | None = None
    memory_bytes: int | None = None
    """The most that a GPU really held."""
    memory_fixed_bytes: int = 0
    """What a rank needs whatever its micro-batch: weights, gradients, optimizer; with a reserve."""
    memory_sample_bytes: float | None = None
    """What each sample of a micro-batch adds; None: not known."""
    memory_free_bytes: int | None = None
    """What a rank may take; None: not known."""
    by_micro_batch: Mapping[int, Compute] = field(default_factory=dict)
    plain_mpi_s: Mapping[int, float] = field(default_factory=dict)
    overlap: bool = True
    """Gradients leave while backward still runs."""

    @property
    def most_samples(self) -> int | None:
        """Return the largest micro-batch that fits into memory, None where that is not known."""
        if self.memory_free_bytes is None or not self.memory_sample_bytes:
            return None
        return max(0, int((self.memory_free_bytes - self.memory_fixed_bytes) / self.memory_sample_bytes))


@dataclass(frozen=True)
class Row:
    """What is predicted for a number of workers."""

    workers: int
    step: StepTime
    error: float
    """Half the width of the 90 % interval of the step time, as a share of it."""
    units_per_s: float
    efficiency: float
    """Throughput per worker relative to one worker."""
    global_batch: int
    relative_steps: float | None
    """Steps to the same loss relative to one worker; None where the noise scale is not known."""
    relative_time: float | None
    """Time to the same loss relative to one worker."""
    time_low: float | None
    time_high: float | None
    hours: float | None
    """Of the recipe's whole training."""
    worker_hours: float | None
    cost: float | None

    @property
    def exposed_share(self) -> float:
        """Return the share of the step that waits for the network."""
        return self.step.exposed_s / self.step.total_s


@dataclass(frozen=True)
class Answer:
    """The table and what follows from it."""

    facts: Facts
    rows: tuple[Row, ...]
    recommended: Row
    reason: str
    limit: str
    """What holds the largest number of workers back most."""
    changes: tuple[tuple[str, float], ...]
    """Settings and what the time to the same loss would be, relative to now, at `changed_workers`."""
    changed_workers: int
    """The recommended number, but at least two where there are."""
    unknown: str = ""
    """Why rows are missing."""

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def worker_counts(to: int) -> list[int]:
    """Return 1, 2, 4, ... and the last one."""
    counts = [2**k for k in range(to.bit_length()) if 2**k <= to]
    return counts if counts[-1] == to else [*counts, to]


def answer(facts: Facts, to: int, price: float | None = None) -> Answer:
    """Predict 1, 2, 4, ... `to` workers.

    Args:
        facts: what was measured.
        to: the most workers.
        price: of a worker and hour.
    """
    rows, unknown = [], ""
    for workers in worker_counts(to):
        layout = Layout.of(workers, facts.ranks_per_host)
        if workers > 1 and (facts.network is None or not facts.network.covers(layout)):
            kind = "between hosts" if layout.hosts > 1 else "inside a host"
            unknown = (
                f"{workers} workers and more need the network {kind}, which was not measured: start plan on several"
                f" {'hosts' if layout.hosts > 1 else 'ranks'}, or describe it with --network 25gbit,5us"
            )
            break
        rows.append(_row(facts, workers, price))
    first = rows[0]
    rows = [_relative(facts, row, first, price) for row in rows]
    best, reason = _recommend(rows)
    changed = best if best.workers > 1 else rows[:2][-1]
    changes = _changes(facts, changed)
    return Answer(facts, tuple(rows), best, reason, _limit(facts, rows[-1]), changes, changed.workers, unknown)


def compute_on(facts: Facts, layout: Layout) -> Compute:
    """Return the slowest rank's own step while all ranks of its host compute: between those measured, along a line."""
    per_host = layout.per_host
    if layout.ranks == 1 or (per_host == 1 and facts.together_ranks > 1):
        return facts.alone
    if facts.together_ranks == 1:
        return facts.together
    share = min(1.0, (per_host - 1) / (facts.together_ranks - 1))
    return Compute(
        *(
            one + share * (all_of_them - one)
            for one, all_of_them in zip(_values(facts.alone), _values(facts.together), strict=True)
        )
    )


def predict(facts: Facts, workers: int) -> StepTime:
    """Return the time of a step on so many workers."""
    layout = Layout.of(workers, facts.ranks_per_host)
    compute = compute_on(facts, layout)
    buckets = facts.buckets if facts.overlap else [Bucket(1.0, bucket.num_bytes) for bucket in facts.buckets]
    return step_time(
        compute,
        buckets,
        facts.network,
        layout,
        interference=facts.interference,
        pace=facts.pace,
        accum_steps=facts.accum_steps,
    )


def _row(facts: Facts, workers: int, price: float | None) -> Row:
    step = predict(facts, workers)
    batch = facts.micro_batch_size * facts.accum_steps * workers
    per_s = batch * facts.units_per_sample / step.total_s
    return Row(workers, step, _error(facts, workers, step), per_s, 1.0, batch, *[None] * 7)


def _relative(facts: Facts, row: Row, first: Row, price: float | None) -> Row:
    efficiency = row.units_per_s / row.workers / first.units_per_s
    if facts.noise is None:
        return replace(row, efficiency=efficiency)
    step = row.step.total_s / first.step.total_s

    def time_with(noise: float) -> float:
        return step * steps_ratio(noise, row.global_batch, first.global_batch)

    steps = steps_ratio(facts.noise.samples, row.global_batch, first.global_batch)
    # More noise makes large batches more useful.
    low, high = sorted((time_with(facts.noise.low), time_with(facts.noise.high)))
    hours = worker_hours = cost = None
    if facts.steps_to_target and facts.recipe_batch:
        at_recipe = steps_ratio(facts.noise.samples, row.global_batch, facts.recipe_batch)
        hours = facts.steps_to_target * at_recipe * row.step.total_s / 3600
        worker_hours = hours * row.workers
        cost = worker_hours * price if price is not None else None
    return replace(
        row,
        efficiency=efficiency,
        relative_steps=steps,
        relative_time=step * steps,
        time_low=low * (1 - row.error),
        time_high=high * (1 + row.error),
        hours=hours,
        worker_hours=worker_hours,
        cost=cost,
    )


def _error(facts: Facts, workers: int, step: StepTime) -> float:
    """Return half the 90 % interval as a share: of what is computed, and of the network, wider where it is far away."""
    # The interquartile range of a normal distribution is 1.35 standard deviations.
    own = facts.spread / 1.35
    if workers == 1 or facts.network is None:
        return _NINETY_PERCENT * own
    doublings = max(0.0, math.log2(workers / facts.network.most_ranks))
    network = math.hypot(facts.network.error, _BEYOND * doublings) * step.exposed_s / step.total_s
    return _NINETY_PERCENT * math.hypot(own, network)


def _recommend(rows: Sequence[Row]) -> tuple[Row, str]:
    """Return the knee: the most speed-up x efficiency, that is speed-up^2 / workers."""

    def speedup(row: Row) -> float:
        if row.relative_time is not None:
            return 1 / row.relative_time
        return row.efficiency * row.workers

    best = max(rows, key=lambda row: speedup(row) ** 2 / row.workers)
    what = "to the same loss" if best.relative_time is not None else "through the data"
    reason = f"{speedup(best):.2f} times as fast {what} as one worker, {speedup(best) / best.workers:.0%} of ideal"
    after = [row for row in rows if row.workers > best.workers]
    if after:
        gain = speedup(after[0]) / speedup(best)
        more = after[0].workers / best.workers
        reason += f"; {more:.3g} times the workers would be {gain:.2f} times as fast"
    elif len(rows) > 1:
        reason += "; the gain goes on: try a larger --to"
    return best, reason


def _limit(facts: Facts, row: Row) -> str:
    if row.workers == 1:
        return "nothing yet: one worker waits for nobody"
    lost: dict[str, float] = {
        "latency of the network": row.step.latency_s / row.step.total_s,
        "bandwidth of the network": row.step.bandwidth_s / row.step.total_s,
        "cores, caches and memory that the ranks of a host share": 1
        - facts.alone.total_s / compute_on(facts, Layout.of(row.workers, facts.ranks_per_host)).total_s,
    }
    if row.relative_steps is not None:
        # Of the work of all workers, what a batch so large wastes.
        lost["the batch: more samples a step hardly save steps"] = 1 - 1 / (row.relative_steps * row.workers)
    if facts.most_samples is not None and facts.most_samples < 2 * facts.micro_batch_size:
        lost["memory: a micro-batch twice as large does not fit"] = _small_batch_loss(facts)
    what = max(lost, key=lambda key: lost[key])
    return f"{what} ({lost[what]:.0%} of the time at {row.workers} workers)"


def _small_batch_loss(facts: Facts) -> float:
    """Return the share of a step that does not grow with the micro-batch, along the line through those measured."""
    own, other = facts.micro_batch_size, facts.by_micro_batch.get(facts.micro_batch_size // 2)
    if other is None:
        return 0.0
    a_sample = (facts.alone.total_s - other.total_s) / (own - own // 2)
    return min(1.0, max(0.0, 1 - own * a_sample / facts.alone.total_s))


def _changes(facts: Facts, best: Row) -> tuple[tuple[str, float], ...]:
    changed: dict[str, Facts] = {}
    if facts.network is not None and best.workers > 1:
        if facts.fp16_network is not None:
            halves = [replace(bucket, num_bytes=bucket.num_bytes // 2) for bucket in facts.buckets]
            changed["--comm.compression fp16"] = replace(facts, network=facts.fp16_network, buckets=halves)
        one = [Bucket(1.0, sum(bucket.num_bytes for bucket in facts.buckets))]
        if len(facts.buckets) > 1:
            changed["one bucket (--comm.bucket-mib larger than the model)"] = replace(facts, buckets=one)
        if facts.network.outside_byte_s:
            quick = replace(facts.network, outside_byte_s=facts.network.outside_byte_s / 4)
            changed["a network of four times the bandwidth"] = replace(facts, network=quick)
        changed[f"--train.accum-steps {4 * facts.accum_steps} (a batch four times as large)"] = replace(
            facts, accum_steps=4 * facts.accum_steps
        )
    for micro, compute in facts.by_micro_batch.items():
        if micro != facts.micro_batch_size:
            factor = compute.total_s / facts.alone.total_s
            changed[f"--train.micro-batch-size {micro}"] = replace(
                facts, micro_batch_size=micro, alone=compute, together=facts.together.scaled(factor)
            )
    return tuple((name, _time(other, best.workers) / _time(facts, best.workers)) for name, other in changed.items())


def _time(facts: Facts, workers: int) -> float:
    """Return the time to the same loss, or per sample where the noise scale is not known, in units of its own."""
    batch = facts.micro_batch_size * facts.accum_steps * workers
    seconds = predict(facts, workers).total_s
    if facts.noise is None:
        return seconds / batch
    return seconds * steps_ratio(facts.noise.samples, batch, 1.0)


def _values(compute: Compute) -> tuple[float, float, float]:
    return compute.forward_s, compute.backward_s, compute.rest_s
