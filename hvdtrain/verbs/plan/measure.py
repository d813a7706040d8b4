"""Steps that are measured: of a rank alone, of all ranks together, and when gradients are ready in them."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hvdtrain.process.launch import Launch
from hvdtrain.settings import BatchPlan
from hvdtrain.settings.compression import APPROXIMATE, AUTO, SPARING
from hvdtrain.trainer import Job, Recipe, Task, train_step
from hvdtrain.trainer.device_clock import finish
from hvdtrain.trainer.rehearsal import rehearse
from hvdtrain.trainer.state import Training, start_training
from hvdtrain.verbs.kit import spread
from hvdtrain.verbs.phase_clock import PhaseClock
from hvdtrain.verbs.plan.step import Bucket, Compute
from hvdtrain.world import SoloWorld, codec_of, in_buckets
from hvdtrain.world.exact import exact_names
from hvdtrain.world.filling import real

# A machine is unsteady when the middle half of its steps differs by more than this share; it is measured longer then.
UNSTEADY = 0.1
_MOST_ROUNDS = 4


@dataclass(frozen=True)
class Measured:
    """What was measured of a rank's own steps."""

    compute: Compute
    spread: float
    """Interquartile range of the steps, as a share of their median."""
    steps: int


def own_job(recipe: Recipe, task: Task, device: torch.device, micro_batch_size: int) -> tuple[Job, Training]:
    """Return a training of this rank alone, with weights of its own."""
    world = SoloWorld(device, Launch("none"))
    world.progress = PhaseClock(device)
    plan = BatchPlan(micro_batch_size, micro_batch_size, 1, 1)
    job = rehearse(task, recipe, world, plan=plan, only_full_batches=True)
    return job, start_training(job)


def own_steps(job: Job, training: Training, *, warmup: int, steps: int) -> Measured:
    """Take steps on this rank alone and return the median of each part; an unsteady machine is given more of them."""
    clock = job.world.progress
    assert isinstance(clock, PhaseClock)
    parts: list[dict[str, float]] = []
    for _ in range(warmup):
        train_step(job, training)
    for _ in range(_MOST_ROUNDS):
        for _ in range(steps):
            clock.take()
            train_step(job, training)
            parts.append(clock.take())
        differ_by = spread([sum(part.values()) for part in parts])
        if differ_by < UNSTEADY:
            break
    forward, backward = (statistics.median(p.get(name, 0.0) for p in parts) for name in ("forward", "backward"))
    total = statistics.median(sum(part.values()) for part in parts)
    return Measured(Compute(forward, backward, max(0.0, total - forward - backward)), differ_by, len(parts))


def ready_buckets(job: Job, training: Training, bucket_bytes: int, in_order: bool = True) -> list[Bucket]:
    """Return the buckets that training would send, each with the share of the backward pass after which it is ready.

    Args:
        job: of this rank alone.
        training: its model.
        bucket_bytes: as `--comm.bucket-mib` says.
        in_order: buckets follow the order in which backward finishes gradients, as from the second step of a run on;
            else the reverse of the model's.
    """
    parameters = [parameter for parameter in training.model.parameters() if parameter.requires_grad]
    seen: dict[nn.Parameter, list[float]] = {parameter: [] for parameter in parameters}
    hooks = []
    for parameter in parameters:
        hang: Any = parameter.register_post_accumulate_grad_hook
        hooks.append(hang(lambda p: seen[p].append(_now(job.world.device))))
    shares: dict[nn.Parameter, list[float]] = {parameter: [] for parameter in parameters}
    clock = job.world.progress
    assert isinstance(clock, PhaseClock)
    for _ in range(3):
        for times in seen.values():
            times.clear()
        train_step(job, training)
        began = clock.began["backward"]
        last = max(times[-1] for times in seen.values() if times)
        for parameter, times in seen.items():
            at = times[-1] if times else last
            shares[parameter].append((at - began) / max(last - began, 1e-9))
    for hook in hooks:
        hook.remove()
    spared, formats = _spared(job, training)
    ready_at = {parameter: statistics.median(of_passes) for parameter, of_passes in shares.items()}
    if in_order:
        parameters.sort(key=lambda parameter: -ready_at[parameter])  # `in_buckets` begins with the last
    buckets = []
    uncut = in_buckets(parameters, bucket_bytes, in_parts=False)
    whole_of = {parameter: number for number, whole in enumerate(uncut) for parameter in whole}
    for group in in_buckets(parameters, bucket_bytes):
        ready = max(ready_at[parameter] for parameter in group)
        wholes = [real(parameter.detach()) for parameter in group]
        dtype, shapes = wholes[0].dtype, [tuple(whole.shape) for whole in wholes]
        count = sum(map(math.prod, shapes)) + len(group)
        as_they_are = codec_of("none").wire_bytes(count, dtype)
        exact = tuple(place for place, parameter in enumerate(group) if parameter in spared)
        kind = str(dtype).removeprefix("torch.")
        buckets.append(Bucket(min(1.0, ready), as_they_are, tuple(shapes), kind, exact, formats, whole_of[group[0]]))
    return sorted(buckets, key=lambda bucket: bucket.ready)


def _spared(job: Job, training: Training) -> tuple[set[nn.Parameter], tuple[str, ...]]:
    """Return the parameters that some formats send as they are, and these formats."""
    exact = job.config.comm.compression_exact
    formats = SPARING if exact == AUTO else APPROXIMATE
    names = exact_names(training.model, formats[0], exact)
    return {parameter for name, parameter in training.model.named_parameters() if name in names}, formats


def whole_steps(job: Job, training: Training, *, warmup: int, steps: int) -> list[float]:
    """Take steps on all ranks and return the seconds of each, the slowest rank's. Collective."""
    world = job.world
    times = []
    for i in range(warmup + steps):
        world.barrier("plan.step")
        started = time.perf_counter()
        train_step(job, training)
        finish(world.device)
        if i >= warmup:
            times.append(time.perf_counter() - started)
    return [max(of_ranks) for of_ranks in zip(*world.all_gather_object(times, "plan.steps"), strict=True)]


def _now(device: torch.device) -> float:
    finish(device)
    return time.perf_counter()
