"""What the ranks measure: their own steps, when gradients are ready, all-reduces, the gradient noise. Collective."""

from __future__ import annotations

import copy
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hvdtrain.data.order import SampleOrder
from hvdtrain.optim.noise import Norms
from hvdtrain.process.launch import Launch
from hvdtrain.process.progress import Phase, Progress
from hvdtrain.rundir.log import MetricLog
from hvdtrain.settings import BatchPlan
from hvdtrain.trainer import Job, Recipe, Task, train_step
from hvdtrain.trainer.state import Training, start_training
from hvdtrain.verbs.plan.network import Layout, Timing
from hvdtrain.verbs.plan.step import Bucket, Compute
from hvdtrain.world import Codec, SoloWorld, World, in_buckets
from hvdtrain.world.inspect import plain_mpi

_NO_RUN = Path("hvdtrain-plan-has-no-run-directory")
SIZES = (4 << 10, 64 << 10, 1 << 20, 4 << 20)
_SECONDS_A_SIZE = 0.3
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


class PhaseClock(Progress):
    """Adds up the seconds of forward and backward passes; a GPU finishes its work at each change of phase."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self._since, self._phase = time.perf_counter(), "rest"
        self.seconds: dict[str, float] = {}
        self.began: dict[str, float] = {}
        """When each phase last began, by `time.perf_counter`."""

    def enter(self, phase: Phase) -> None:
        """Note the phase."""
        self.turn(phase)
        super().enter(phase)

    def turn(self, phase: str) -> None:
        """End the phase before."""
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[self._phase] = self.seconds.get(self._phase, 0.0) + now - self._since
        self._since, self._phase = now, phase
        self.began[phase] = now


def own_job(recipe: Recipe, task: Task, device: torch.device, micro_batch_size: int) -> tuple[Job, Training]:
    """Return a training of this rank alone, with weights of its own."""
    world = SoloWorld(device, Launch("none"))
    world.progress = PhaseClock(device)
    plan = BatchPlan(micro_batch_size, micro_batch_size, 1, 1)
    task = dataclasses.replace(task, model=copy.deepcopy(task.model))
    order = SampleOrder(len(task.train_data), plan, recipe.train.seed)
    job = Job(task, recipe, world, _NO_RUN, MetricLog(None, []), plan, order, num_steps=1_000_000)
    return job, start_training(job)


def own_steps(job: Job, training: Training, *, warmup: int, steps: int) -> Measured:
    """Take steps on this rank alone and return the median of each part; an unsteady machine is given more of them."""
    clock = job.world.progress
    assert isinstance(clock, PhaseClock)
    parts: list[dict[str, float]] = []
    for _ in range(warmup):
        _step(job, training)
    for _ in range(_MOST_ROUNDS):
        for _ in range(steps):
            clock.turn("rest")
            clock.seconds = {}
            _step(job, training)
            clock.turn("rest")
            parts.append(dict(clock.seconds))
        spread = _spread([sum(part.values()) for part in parts])
        if spread < UNSTEADY:
            break
    forward, backward = (statistics.median(p.get(name, 0.0) for p in parts) for name in ("forward", "backward"))
    total = statistics.median(sum(part.values()) for part in parts)
    return Measured(Compute(forward, backward, max(0.0, total - forward - backward)), spread, len(parts))


def _step(job: Job, training: Training) -> None:
    training.step %= max(1, job.order.steps_per_epoch - 1)
    train_step(job, training)


def ready_buckets(job: Job, training: Training, bucket_bytes: int, codec: Codec) -> list[Bucket]:
    """Return the buckets that training would send, each with the share of the backward pass after which it is ready.

    Args:
        job: of this rank alone.
        training: its model.
        bucket_bytes: as `--comm.bucket-mib` says.
        codec: what they become on the wire.
    """
    parameters = [parameter for parameter in training.model.parameters() if parameter.requires_grad]
    groups = in_buckets(parameters, bucket_bytes)
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
        _step(job, training)
        began = clock.began["backward"]
        last = max(times[-1] for times in seen.values() if times)
        for parameter, times in seen.items():
            at = times[-1] if times else last
            shares[parameter].append((at - began) / max(last - began, 1e-9))
    for hook in hooks:
        hook.remove()
    buckets = []
    for group in groups:
        ready = max(statistics.median(shares[parameter]) for parameter in group)
        numbers = sum(parameter.numel() for parameter in group) + len(group)
        buckets.append(Bucket(min(1.0, ready), codec.wire_bytes(numbers, group[0].dtype)))
    return sorted(buckets, key=lambda bucket: bucket.ready)


def groups_of(size: int, per_host: int) -> list[tuple[int, ...]]:
    """Return the groups of ranks, smaller than the world, whose all-reduces are measured.

    One rank alone, which shows what is no network's; 2, 4, ... ranks in turn; one rank of each of 2, 4, ... hosts.
    """
    if size == 1:
        return []
    groups = [(0,), *(tuple(range(n)) for n in _doubling(size))]
    if 1 < per_host < size:
        leaders = range(0, size, per_host)
        groups += [tuple(leaders[:n]) for n in (*_doubling(len(leaders)), len(leaders)) if n > 1]
    return [group for group in dict.fromkeys(groups) if len(group) < size]


def _doubling(size: int) -> list[int]:
    return [2**k for k in range(1, size.bit_length()) if 2**k < size]


def all_reduce_timings(
    world: World, hosts: Sequence[str], sizes: Sequence[int], dtype: torch.dtype
) -> tuple[list[Timing], dict[int, float]]:
    """Measure all-reduces of these sizes over groups of ranks. Collective.

    Args:
        world: whose groups were made by `groups_of`.
        hosts: of each rank.
        sizes: bytes.
        dtype: of the numbers.

    Returns:
        The timings, and plain MPI's seconds by size over all ranks, where mpi4py sees the same ones. The same on all.
    """
    timings: list[Timing] = []
    groups = [*groups_of(world.size, max(map(list(hosts).count, hosts))), tuple(range(world.size))]
    for group in groups:
        layout = Layout(len(group), len({hosts[rank] for rank in group}))
        for num_bytes in sizes if len(group) > 1 else sizes[:1]:
            seconds = _time_group(world, group, num_bytes, dtype)
            timings.append(Timing(layout, num_bytes, seconds))
    plain: dict[int, float] = {}
    mpi = plain_mpi(world)
    if all(world.all_gather_object(mpi is not None, "plan.mpi")) and mpi is not None:
        for num_bytes in sizes:
            times = [_seconds(lambda size=num_bytes: mpi(size)) for _ in range(5)]  # type: ignore[misc]
            plain[num_bytes] = max(world.all_gather_object(statistics.median(times), f"plan.mpi.{num_bytes}"))
    return timings, plain


def _time_group(world: World, group: tuple[int, ...], num_bytes: int, dtype: torch.dtype) -> float:
    name = f"plan.{'-'.join(map(str, group))}.{num_bytes}.{dtype}"
    mine = 0.0
    tensor = torch.zeros(max(1, num_bytes // dtype.itemsize), dtype=dtype, device=world.device)
    is_in = world.rank in group
    if is_in:
        world.all_reduce_among(group, tensor, name)  # the first one negotiates
    world.barrier(f"{name}.begin")
    if is_in:
        first = _seconds(lambda: world.all_reduce_among(group, tensor, name))
        slowest = float(world.all_reduce_among(group, torch.tensor([first]), f"{name}.first", "max"))
        repeats = max(3, min(100, int(_SECONDS_A_SIZE / max(slowest, 1e-6))))
        times = [_seconds(lambda: world.all_reduce_among(group, tensor, name)) for _ in range(repeats)]
        mine = statistics.median(times)
    return max(world.all_gather_object(mine, f"{name}.median"))


def gradient_norms(job: Job, training: Training, world: World, steps: int) -> tuple[list[Norms], int, int]:
    """Measure squared gradient norms of small batches and of all of them together. Collective.

    Between ranks a small batch is a rank's micro-batch; one rank alone cuts its micro-batch in two. Meanwhile the model
    is trained, on the large batches.

    Returns:
        The norms of each step, the small and the large batch in samples; nothing where a micro-batch is one sample.
    """
    size, micro = world.size, job.plan.micro_batch_size
    parts = 1 if size > 1 else 2
    small = micro // parts
    if small == 0:
        return [], 0, 0
    large = small * parts * size
    for group in training.optimizer.param_groups:
        group["lr"] = job.config.optim.peak_lr
    norms = []
    for step in range(steps):
        place = (step * size + world.rank) % max(1, job.order.steps_per_epoch - 1)
        samples = job.order.global_batch(place)[: small * parts]
        own = [_gradient(job, training, samples[i * small : (i + 1) * small]) for i in range(parts)]
        mean = torch.stack(own).mean(0)
        squares = torch.stack([gradient.double().square().sum() for gradient in own]).mean()
        if size > 1:
            mean = world.all_reduce(mean, "mean", "plan.gradient")
            squares = world.all_reduce(squares, "mean", "plan.norm")
        norms.append(Norms(float(squares), float(mean.double().square().sum())))
        _apply(training, mean)
    return norms, small, large


def _gradient(job: Job, training: Training, samples: Tensor) -> Tensor:
    """Return the gradient of the mean loss of `samples`, flat."""
    from hvdtrain.trainer.loop import forward_sums

    training.optimizer.zero_grad()
    positions = torch.arange(len(samples))
    targets = max(1, job.task.train_data.num_targets(samples))
    training.randomness.run(
        positions,
        (job.config.train.seed, 0),
        lambda: forward_sums(job, training.model, samples),
        lambda sums: (sums["loss"] / targets).backward(),  # type: ignore[no-untyped-call]
    )
    gradients = [p.grad for p in training.model.parameters() if p.grad is not None]
    return torch.cat([(g.to_dense() if g.is_sparse else g).float().flatten() for g in gradients])


def _apply(training: Training, mean: Tensor) -> None:
    """Take an optimizer step along a flat gradient, clipped to length 1."""
    mean = mean * torch.clamp(1.0 / (mean.norm() + 1e-6), max=1.0)
    start = 0
    for parameter in training.model.parameters():
        if parameter.grad is not None:
            count = parameter.numel()
            parameter.grad = mean[start : start + count].view(parameter.shape).to(parameter.dtype)
            start += count
    training.optimizer.step()


def whole_steps(job: Job, training: Training, *, warmup: int, steps: int) -> list[float]:
    """Take steps on all ranks and return the seconds of each, the slowest rank's. Collective."""
    world = job.world
    times = []
    for i in range(warmup + steps):
        world.barrier("plan.step")
        started = time.perf_counter()
        _step(job, training)
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        if i >= warmup:
            times.append(time.perf_counter() - started)
    return [max(of_ranks) for of_ranks in zip(*world.all_gather_object(times, "plan.steps"), strict=True)]


def _spread(values: Sequence[float]) -> float:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / middle


def _seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
