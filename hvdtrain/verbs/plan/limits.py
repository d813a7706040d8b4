"""What holds workers back most, and what changed settings would do about it. Pure functions."""

from __future__ import annotations

from dataclasses import replace

from hvdtrain.errors import counted
from hvdtrain.optim.noise import steps_ratio
from hvdtrain.verbs.plan.facts import Facts, compute_on, predict
from hvdtrain.verbs.plan.network import Layout, Network
from hvdtrain.verbs.plan.rows import Row
from hvdtrain.verbs.plan.step import joined


def limit_of(facts: Facts, row: Row) -> str:
    """Return what takes the largest share of the time at a row's number of workers, in words."""
    if row.workers == 1:
        return "nothing yet: one worker waits for nobody"
    lost: dict[str, float] = {
        "latency of the network": row.step.latency_s / row.step.total_s,
        "bandwidth of the network": row.step.bandwidth_s / row.step.total_s,
        "cores, caches and memory that the ranks of a host share": 1
        - facts.own_step_s(facts.alone)
        / facts.own_step_s(compute_on(facts, Layout.of(row.workers, facts.ranks_per_host))),
    }
    if row.relative_steps is not None:
        # Of the work of all workers, what a batch so large wastes.
        lost["the batch: more samples a step hardly save steps"] = 1 - 1 / (row.relative_steps * row.workers)
    if facts.most_samples is not None and facts.most_samples < 2 * facts.micro_batch_size:
        lost["memory: a micro-batch twice as large does not fit"] = _small_batch_loss(facts)
    what = max(lost, key=lambda key: lost[key])
    return f"{what} ({lost[what]:.0%} of the time at {counted(row.workers, 'worker')})"


def _small_batch_loss(facts: Facts) -> float:
    """Return the share of a step that does not grow with the micro-batch, along the line through those measured."""
    own, other = facts.micro_batch_size, facts.by_micro_batch.get(facts.micro_batch_size // 2)
    if other is None:
        return 0.0
    a_sample = (facts.alone.total_s - other.total_s) / (own - own // 2)
    return min(1.0, max(0.0, 1 - own * a_sample / facts.alone.total_s))


def changes_of(facts: Facts, best: Row) -> tuple[tuple[str, float], ...]:
    """Return settings, and what each would make of the time to the same loss at a row's workers: 0.8 is 20 % less."""
    changed: dict[str, Facts] = {}
    if facts.network is not None and best.workers > 1:
        if len(facts.buckets) > 1 and len({bucket.dtype for bucket in facts.buckets}) == 1:
            one = (joined(facts.buckets),)
            changed["one bucket (--comm.bucket-mib larger than the model)"] = replace(facts, buckets=one)
        if facts.network.outside_byte_s:
            quick, quick_fp16 = (_of_more_bandwidth(network, 4) for network in (facts.network, facts.fp16_network))
            changed["a network of four times the bandwidth"] = replace(facts, network=quick, fp16_network=quick_fp16)
        changed[f"--train.accum-steps {4 * facts.accum_steps} (a batch four times as large)"] = replace(
            facts, accum_steps=4 * facts.accum_steps
        )
    for micro, compute in facts.by_micro_batch.items():
        if micro != facts.micro_batch_size:
            factor = compute.total_s / facts.alone.total_s
            changed[f"--train.micro-batch-size {micro}"] = replace(
                facts, micro_batch_size=micro, alone=compute, together=facts.together.scaled(factor)
            )
    return tuple(
        (name, _time_to_loss(other, best.workers) / _time_to_loss(facts, best.workers))
        for name, other in changed.items()
    )


def _of_more_bandwidth(network: Network | None, times: float) -> Network | None:
    """Return the network with so many times the bandwidth between hosts."""
    if network is None or network.outside_byte_s is None:
        return network
    return replace(network, outside_byte_s=network.outside_byte_s / times)


def _time_to_loss(facts: Facts, workers: int) -> float:
    """Return the time to the same loss, or per sample where the noise scale is not known, in units of its own."""
    batch = facts.micro_batch_size * facts.accum_steps * workers
    seconds = predict(facts, workers).total_s
    if facts.noise is None:
        return seconds / batch
    return seconds * steps_ratio(facts.noise.samples, batch, 1.0)


def difference(factor: float, of: str = "") -> str:
    """Return a factor in words: "36% less", "no difference" for what rounds to none; `of` stands behind "less"."""
    if round(100 * abs(1 - factor)) == 0:
        return "no difference"
    return f"{abs(1 - factor):.0%} {'less' if factor < 1 else 'more'}{of}"
