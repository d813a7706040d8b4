"""Everything that a plan is made of, measured on all ranks. Collective."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

import torch

from hvdtrain.optim.noise import NoiseScale, noise_scale
from hvdtrain.settings.compression import EXACT, parse_compression
from hvdtrain.trainer import Job, Recipe, Task
from hvdtrain.trainer.bucket_order import follows_backward
from hvdtrain.trainer.free_memory import available
from hvdtrain.trainer.memory import RESERVE, estimate
from hvdtrain.trainer.state import Training, start_training
from hvdtrain.trainer.ways import why_refused
from hvdtrain.verbs.plan import measure
from hvdtrain.verbs.plan.all_reduce import all_reduce_timings, sizes_for
from hvdtrain.verbs.plan.calibrate import calibrated
from hvdtrain.verbs.plan.facts import Facts
from hvdtrain.verbs.plan.formats import measured_formats, with_paces
from hvdtrain.verbs.plan.gradients import gradient_norms
from hvdtrain.verbs.plan.methods import FORMATS, Format, methods_of
from hvdtrain.verbs.plan.network import Controller, Layout, Network, fit
from hvdtrain.verbs.plan.step import Bucket
from hvdtrain.world import World

# A rank this much slower than the median one is named.
_STRAGGLER = 1.15


def gather(name: str, recipe: Recipe, task: Task, job: Job, hosts: Sequence[str], noise_steps: int) -> Facts:
    """Measure everything; the same facts on every rank. Collective.

    Args:
        name: what the user called the recipe.
        recipe: its settings, as the user gave them.
        task: its model and data.
        job: a training on all ranks.
        hosts: of each rank.
        noise_steps: steps to train for the gradient noise scale; 0: it is not measured.
    """
    world, plan = job.world, job.plan
    settings: Any = job.config  # the recipe, with what the trainer has settled
    room = _memory(job)
    by_micro, memory = _own_by_micro_batch(settings, task, world, plan.micro_batch_size, room)
    own, training = measure.own_job(settings, task, world.device, plan.micro_batch_size)
    world.barrier("plan.together")
    of_ranks = world.all_gather_object(measure.own_steps(own, training, warmup=1, steps=5), "plan.own")
    buckets = measure.ready_buckets(own, training, recipe.comm.bucket_mib << 20, follows_backward(job))
    buckets = world.broadcast_object(buckets, "plan.buckets")
    network, fp16, plain = _network(world, hosts, buckets)
    samples = job.order.global_batch(0)
    alone = by_micro[plan.micro_batch_size]
    facts = Facts(
        recipe=name,
        unit=task.unit,
        units_per_sample=task.train_data.num_targets(samples) / len(samples),
        micro_batch_size=plan.micro_batch_size,
        accum_steps=plan.accum_steps,
        ranks_per_host=hosts.count(hosts[0]),
        alone=alone.compute,
        together=max((item.compute for item in of_ranks), key=lambda compute: compute.total_s),
        together_ranks=hosts.count(hosts[0]),
        spread=statistics.median(item.spread for item in of_ranks),
        buckets=buckets,
        network=network,
        fp16_network=fp16,
        noise=_noise(own, training, world, noise_steps),
        slowest=_straggler(of_ranks, hosts),
        recipe_batch=plan.global_batch_size,
        memory_bytes=memory,
        memory_fixed_bytes=room.fixed_bytes,
        memory_sample_bytes=room.sample_bytes,
        memory_free_bytes=room.free_bytes,
        by_micro_batch={size: item.compute for size, item in by_micro.items()},
        plain_mpi_s=plain,
        adds_bfloat16=world.adds_bfloat16,
        **_of_settings(recipe),
    )
    if network is None:
        return dataclasses.replace(facts, measured_steps_s=facts.alone_measured_s)
    facts = dataclasses.replace(facts, formats=_formats(facts, recipe, world, hosts))
    # Real steps of all ranks tell how much of the hidden communication the computing pays for.
    whole = measure.whole_steps(job, start_training(job), warmup=2, steps=8)
    return calibrated(facts, world.size, statistics.median(whole))


def _of_settings(recipe: Recipe) -> dict[str, Any]:
    """Return the facts that the recipe's settings say."""
    comm = recipe.comm
    return {
        "steps_to_target": recipe.train.steps,
        "compression": comm.compression,
        "compression_min_size": comm.compression_min_size,
        "period": comm.period,
        "fragments": comm.fragments,
        "overlap_steps": comm.overlap_steps,
        "is_sharded": recipe.optim.shard,
        "refused": _refused(recipe),
    }


def _formats(facts: Facts, recipe: Recipe, world: World, hosts: Sequence[str]) -> dict[str, Format]:
    """Measure the formats of gradients that are compared, as far as there is memory for them. Collective."""
    assert facts.network is not None
    names = [name for name in dict.fromkeys((recipe.comm.compression, *FORMATS)) if _has_room(name, facts)]
    layout = Layout(world.size, len(set(hosts)))
    return measured_formats(world, layout, recipe.comm, names, facts.buckets, (facts.network, facts.fp16_network))


def _refused(recipe: Recipe) -> dict[str, str]:
    """Return the ways to average that are compared and that training refuses beside the recipe's other settings."""
    comm = recipe.comm
    found = {}
    for method in methods_of(comm.compression, comm.period, comm.fragments, comm.overlap_steps):
        why = why_refused(recipe, **method.settings)
        if why:
            found[method.flags] = why
    return found


def _noise(own: Job, training: Training, world: World, steps: int) -> NoiseScale | None:
    norms, small, large = gradient_norms(own, training, world, steps)
    # The first steps of all have gradients of their own kind.
    return noise_scale(norms[len(norms) // 2 :], small, large) if norms else None


@dataclasses.dataclass(frozen=True)
class _Room:
    """What a rank needs, and what the one with the least memory has."""

    fixed_bytes: int
    sample_bytes: float | None
    free_bytes: int | None

    def holds(self, samples: int) -> bool:
        """Return whether a micro-batch of so many samples fits, as far as is known."""
        if self.free_bytes is None or self.sample_bytes is None:
            return True
        return self.fixed_bytes + samples * self.sample_bytes <= self.free_bytes


def _memory(job: Job) -> _Room:
    """Return rank 0's estimate, and the least that any rank has. Collective."""
    needed = estimate(job)
    of_ranks = job.world.all_gather_object((needed, available(job)[0]), "plan.memory")
    needed = of_ranks[0][0]
    known = [free for _, free in of_ranks if free is not None]
    a_sample = (
        None if needed.of_micro_batch is None else needed.of_micro_batch * (1 + RESERVE) / needed.micro_batch_size
    )
    return _Room(int(needed.fixed * (1 + RESERVE)), a_sample, min(known, default=None))


def _own_by_micro_batch(
    recipe: Recipe, task: Task, world: World, micro: int, room: _Room
) -> tuple[dict[int, measure.Measured], int | None]:
    """Measure rank 0's steps at several micro-batches while the others wait. Collective."""
    found: dict[int, measure.Measured] = {}
    memory = None
    if world.rank == 0:
        sizes = [
            micro,
            *(size for size in (micro // 2, 2 * micro) if 0 < size <= len(task.train_data) and room.holds(size)),
        ]
        for size in sizes:
            own, training = measure.own_job(recipe, task, world.device, size)
            found[size] = measure.own_steps(own, training, warmup=1, steps=5 if size == micro else 3)
            if world.device.type == "cuda" and size == micro:
                memory = torch.cuda.max_memory_allocated(world.device)
    return world.broadcast_object((found, memory), "plan.alone")


def _has_room(name: str, facts: Facts) -> bool:
    """Return whether what a format remembers, and its messages, fit beside training."""
    if facts.most_samples is None or facts.memory_free_bytes is None or parse_compression(name)[0] in EXACT:
        return True
    assert facts.memory_sample_bytes is not None
    used = facts.memory_fixed_bytes + facts.micro_batch_size * facts.memory_sample_bytes
    return used + 6 * sum(bucket.num_bytes for bucket in facts.buckets) <= facts.memory_free_bytes


def _network(
    world: World, hosts: Sequence[str], buckets: Sequence[Bucket]
) -> tuple[Network | None, Network | None, dict[int, float]]:
    """Measure and fit the network, for fp32 and for fp16. Collective."""
    if world.size == 1:
        return None, None, {}
    controller: Controller = "gloo" if world.launch.launcher == "horovodrun --gloo" else "mpi"
    sizes = sizes_for([bucket.num_bytes for bucket in buckets])
    timings, plain = all_reduce_timings(world, hosts, sizes, torch.float32)
    halves = sorted({size // 2 for size in sizes})
    in_fp16, _ = all_reduce_timings(world, hosts, halves, torch.float16)
    layout = Layout(world.size, len(set(hosts)))
    return with_paces(world, layout, fit(controller, timings), buckets), fit(controller, in_fp16), plain


def _straggler(of_ranks: list[measure.Measured], hosts: Sequence[str]) -> str:
    times = [item.compute.total_s for item in of_ranks]
    middle = statistics.median(times)
    worst = max(range(len(times)), key=lambda rank: times[rank])
    if len(times) < 2 or times[worst] < _STRAGGLER * middle:
        return ""
    return f"rank {worst} on {hosts[worst]} takes {times[worst] / middle:.2f} times as long as the median rank"
