"""A plan as a person reads it in a terminal. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterator

from hvdtrain.errors import counted
from hvdtrain.optim.noise import NoiseScale
from hvdtrain.settings.units import in_units
from hvdtrain.verbs.plan.answer import Answer
from hvdtrain.verbs.plan.facts import Facts
from hvdtrain.verbs.plan.limits import difference
from hvdtrain.verbs.plan.network import Network
from hvdtrain.verbs.plan.rows import Row

# The natural logarithm of a pace from which on it is said: the network was 1.3 times as slow, or as fast.
_NOTED = 0.262


def table(answer: Answer) -> str:
    """Return the answer as a person reads it in a terminal."""
    facts = answer.facts
    head = f"{'workers':>7} {'ms a step':>18} {facts.unit + '/s':>12} {'efficiency':>10} {'waits':>6} {'batch':>8}"
    if facts.noise is not None:
        head += f" {'steps':>6} {'time to the same loss':>23}"
    if answer.rows[0].hours is not None:
        head += f" {'hours':>8} {'worker-h':>9}"
    if answer.rows[0].cost is not None:
        head += f" {'cost':>9}"
    lines = [head, *(_line(answer, row) for row in answer.rows)]
    head = (
        f"recommended: {counted(answer.recommended.workers, 'worker')}" if answer.recommended else "no recommendation"
    )
    lines += [f"{head}: {answer.reason}"]
    lines += [f"what limits: {answer.limit}"]
    for name, factor in sorted(answer.changes, key=lambda change: change[1]):
        lines.append(f"  {name}: {difference(factor, ' time')} at {counted(answer.changed_workers, 'worker')}")
    if answer.unknown:
        lines.append(answer.unknown)
    lines += _methods(answer)
    return "\n".join(lines)


def _line(answer: Answer, row: Row) -> str:
    step = row.step.total_s * 1e3
    mark = ">" if row == answer.recommended else " "
    measured = answer.facts.measured_steps_s.get(row.workers)
    interval = f"{step:.4g} ± {100 * row.error:.0f}%"
    line = (
        f"{mark}{row.workers:6} {interval:>18} {row.units_per_s:12,.0f} {row.efficiency:10.0%} {row.exposed_share:6.0%}"
        f" {row.global_batch:8}"
    )
    if row.relative_steps is not None and row.relative_time is not None:
        assert row.time_low is not None
        assert row.time_high is not None
        line += f" {row.relative_steps:6.3f} {row.relative_time:7.3f} [{row.time_low:.3f}, {row.time_high:.3f}]"
    if row.hours is not None:
        line += f" {row.hours:8.3g} {row.worker_hours:9.3g}"
    if row.cost is not None:
        line += f" {row.cost:9.2f}"
    return line + (f"   (measured: {measured * 1e3:.4g} ms)" if measured is not None else "")


def _methods(answer: Answer) -> Iterator[str]:
    """Yield the ways to average on the workers of `method_workers`, and what the losses are of."""
    rows = [row for row in answer.methods if row.workers == answer.method_workers]
    if not rows:
        return
    yield ""
    width, head = max(27, *(len(row.method) for row in rows)), f"on {counted(answer.method_workers, 'worker')}"
    yield (
        f"{head:{width + 1}} {'ms a step':>16} {answer.facts.unit + '/s':>12}"
        f" {'times':>6} {'sends a step':>13} {'loss, measured':>15}"
    )
    for row in rows:
        mark = ">" if row == answer.method else " "
        interval = f"{row.step.total_s * 1e3:.4g} ± {100 * row.error:.0f}%"
        loss = "?" if row.loss is None else str(row.loss) if row.loss.change else "exact"
        yield (
            f"{mark}{row.method:{width}} {interval:>16} {row.units_per_s:12,.0f} {row.speedup:6.2f}"
            f" {in_units(row.bytes_per_step):>13} {loss:>15}"
        )
        if row.contradiction:
            yield f"   {row.method}: {row.contradiction}"
    yield (
        "loss: above that of exact averages, where this project has measured it on small decoders, in up to 1,500 steps"
        " (local updates: with a period of 20); compare on your own task"
    )
    if answer.method is not None:
        flags = answer.method.flags
        yield f"to average: {answer.method.method}{f' ({flags})' if flags else ''}: {answer.method_reason}"
    elif answer.method_reason:
        yield f"to average: no recommendation: {answer.method_reason}"


def describe(facts: Facts) -> str:
    """Return what was measured, before what follows from it."""
    lines = [_describe_compute(facts)]
    if facts.most_samples is not None and facts.memory_free_bytes is not None:
        lines.append(
            f"memory:     {in_units(facts.memory_free_bytes)} for a rank: micro-batches of up to about"
            f" {facts.most_samples:,} samples fit"
        )
    if facts.together_ranks > 1:
        slower = facts.own_step_s(facts.together) / facts.own_step_s(facts.alone)
        lines.append(f"            {slower:.2f} times as long while all {facts.together_ranks} ranks of a host compute")
    if facts.slowest:
        lines.append(f"warning:    {facts.slowest}; the slowest rank's times are used")
    if facts.network is not None:
        lines += _describe_communication(facts, facts.network)
    if facts.noise is not None:
        lines.append(_describe_noise(facts.noise))
    return "\n".join(lines)


def _describe_compute(facts: Facts) -> str:
    alone = facts.alone
    memory = f"; {facts.memory_bytes / 2**30:.2f} GiB" if facts.memory_bytes else ""
    each = " a micro-batch" if facts.accum_steps > 1 else ""
    return (
        f"one rank:   {facts.own_step_s(alone) * 1e3:.4g} ms a step: forward {alone.forward_s * 1e3:.4g}, backward"
        f" {alone.backward_s * 1e3:.4g}{each}, optimizer and the rest {alone.rest_s * 1e3:.4g};"
        f" {facts.micro_batch_size} samples x {facts.accum_steps}; steps differ by {facts.spread:.0%}{memory}"
    )


def _describe_communication(facts: Facts, network: Network) -> Iterator[str]:
    megabytes = sum(bucket.num_bytes for bucket in facts.buckets) / 1e6
    yield f"network:    {_describe_network(network)}; {megabytes:.4g} MB of gradients"
    for size, seconds in facts.plain_mpi_s.items():
        yield f"            plain MPI takes {seconds * 1e3:.4g} ms for {size / 1e6:.4g} MB over all ranks"
    if abs(math.log(facts.pace)) > _NOTED:
        yield (
            f"            in a step of all ranks it takes {facts.pace:.2f} times what single all-reduces tell;"
            " predictions have that factor, and wider intervals"
        )
    if facts.interference:
        yield f"            {facts.interference:.0%} of the communication that is hidden slows computing down"


def _describe_noise(noise: NoiseScale) -> str:
    near_beginning = f"from {noise.measurements} steps near the beginning; it grows while a model learns"
    whole = f"over a training, from {noise.measurements} windows of it"
    return (
        f"batch:      gradient noise scale {noise.samples:,.3g} samples [{noise.low:,.3g}, {noise.high:,.3g}],"
        f" {whole if noise.is_whole_training else near_beginning}"
    )


def _describe_network(network: Network) -> str:
    parts = []
    inside, outside = network.inside_byte_s, network.outside_byte_s
    for name, byte_s, latency_s in (
        ("inside a host", inside, network.inside_latency_s),
        ("between hosts", outside, network.outside_latency_s),
    ):
        if byte_s is not None:
            rate = f"{1 / byte_s / 1e6:,.0f} MB/s" if byte_s > 0 else "no time for bytes"
            parts.append(f"{name} {rate}, {(latency_s or 0) * 1e6:,.0f} us a round")
    return f"{'; '.join(parts)} ({network.controller}; the fit is off by {network.error:.0%})"
