"""What a step is: micro-batches forward and backward, the average over the ranks, one update.

The loss of a step is the mean over the *global* batch, exactly: each rank sums over its own part, and every rank knows
how many terms the whole batch has without asking, since that is a function of the sample indices.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from hvdtrain.data.nested import map_tensors
from hvdtrain.data.readers import read_samples
from hvdtrain.errors import ConfigError
from hvdtrain.models.private_torch import run_backward
from hvdtrain.settings import Precision
from hvdtrain.trainer.component import Step, Totals
from hvdtrain.trainer.contract import first_batch
from hvdtrain.trainer.job import Job
from hvdtrain.trainer.model import own_type, type_as
from hvdtrain.trainer.saved_state import check_storable
from hvdtrain.trainer.state import Training
from hvdtrain.trainer.task import Batch
from hvdtrain.trainer.update import update
from hvdtrain.trainer.values import added, as_sums, as_totals, count_targets, no_totals
from hvdtrain.world import digest_of

_NO_CONTEXT = nullcontext()
_CAST_TO: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}


def train_step(job: Job, training: Training) -> None:
    """Take one optimizer step along the gradient of the mean loss over the global batch. Collective.

    Where the loss or the gradient of any rank is not finite, no rank updates its weights; that is said in the step
    after, or when metrics or state are asked for.

    Raises:
        DivergedError: that has happened `--health.max-skipped-steps` times in a row.
    """
    world, number = job.world, training.step
    world.progress.begin_step(number)
    training.optimizer.zero_grad()
    samples = job.order.global_batch(number)
    num_targets = count_targets(job.task.train_data, samples)
    totals = no_totals(job.task.metrics, world)
    micro_batches = job.order.micro_batches(number, world.rank, training.runs_in_step)
    is_checked = training.is_unchecked and _all_ranks_read(job, training)
    for place, positions in enumerate(micro_batches):
        part = _micro_batch(job, training, place, positions, num_targets, is_checked and place == 0)
        totals = added(totals, part)
    training.optimizer.synchronize()
    step = Step(number + 1, totals, num_targets, samples.numel())
    training.after_backward(step)
    world.progress.enter("update")
    update(job, training, step)
    if is_checked:
        world.together(lambda: check_storable(training), "contract.state")
    world.progress.enter("between steps")


def _all_ranks_read(job: Job, training: Training) -> bool:
    """Return whether no rank is without samples in this step, as in the last one of an epoch; alike on all ranks."""
    of_ranks = (job.order.micro_batches(training.step, rank, training.runs_in_step) for rank in range(job.world.size))
    return all(micro_batches and len(micro_batches[0]) for micro_batches in of_ranks)


def _micro_batch(
    job: Job, training: Training, place: int, positions: Tensor, num_targets: int, is_checked: bool
) -> Totals:
    """Add a micro-batch's gradient; returns its sums of `Task.metrics`.

    Args:
        job: what is trained.
        training: what changes.
        place: the micro-batch's number in the step.
        positions: where its samples stand in the global batch.
        num_targets: those of the global batch.
        is_checked: whether the recipe's contract is checked on it. Collective then.
    """
    task, world, train = job.task, job.world, job.config.train

    world.progress.enter("data")
    read = partial(training.reader.read, training.step, place)
    batch = _checked_batch(job, training, positions, read) if is_checked else read()

    samples = job.order.global_batch(training.step)[positions] if task.reduction == "mean" else positions

    def forward() -> dict[str, Tensor]:
        values = forward_batch(job, training.model, batch)
        return values if task.reduction == "sum" else as_sums(values, task.reduction, task.train_data, samples)

    def backward(sums: dict[str, Tensor]) -> None:
        world.progress.enter("backward")
        if task.reduction == "mean" and not training.runs_in_step and not count_targets(task.train_data, samples):
            return  # the mean over nothing is nan, and so are its gradients
        if not sums["loss"].requires_grad:
            raise ConfigError(
                f"the 'loss' that loss_sums returned in step {training.step + 1} does not depend on the weights: where"
                " there is nothing to learn from a micro-batch, return 0 times what the model has computed"
            )
        # The ranks' gradients are averaged, the loss is a sum: hence the number of ranks. Adding 0 x loss makes the
        # gradient of a loss that is not finite not finite either, which all ranks then see in the average. A batch
        # without targets has a gradient of zeros.
        share = world.size / num_targets if num_targets else 0.0
        factor = _plus_zero_times(share, sums["loss"], world.reads_at_once)
        if training.acting("before_backward"):
            training.before_backward(sums["loss"] * factor).backward()  # type: ignore[no-untyped-call]
        elif type(sums["loss"]) is Tensor:
            run_backward(sums["loss"], factor)
        else:
            sums["loss"].backward(factor)  # type: ignore[no-untyped-call]

    with training.randomness.observed(job.log.say) if is_checked else _NO_CONTEXT:
        sums = training.randomness.run(positions, (train.seed, training.step), forward, backward)
    return as_totals(sums, task.metrics, world)


def _plus_zero_times(share: float, loss: Tensor, at_once: bool) -> Tensor:
    """Return `share + 0 x loss`, of the loss's type and shape; by a look at it, where that need not wait."""
    if not at_once or loss.numel() != 1:
        return share + 0 * loss.detach()
    return torch.full_like(loss, share if math.isfinite(loss.item()) else math.nan, requires_grad=False)


def _checked_batch(job: Job, training: Training, positions: Tensor, read: Callable[[], Batch]) -> Batch:
    """Return the first micro-batch of this start, the recipe's contract checked on it. Collective."""
    training.is_unchecked = False
    samples = job.order.global_batch(training.step)[positions]
    forward = partial(training.randomness.apart, partial(forward_batch, job, training.model))
    if job.world.reads_at_once:
        return first_batch(job, training.model, samples, read, forward)
    before, training.weights_rest = _digest(training.model), True

    def observed(batch: Batch) -> dict[str, Tensor]:
        values = forward(batch)
        training.weights_rest &= before.equal(_digest(training.model))  # now: afterwards all is put back
        return values

    return first_batch(job, training.model, samples, read, observed)


def _digest(model: nn.Module) -> Tensor:
    """Return what changes when a parameter does, in host memory."""
    return torch.stack([digest_of(parameter) for parameter in model.parameters()]).cpu()


def forward_sums(job: Job, model: nn.Module, samples: Tensor) -> dict[str, Tensor]:
    """Read `samples`, int64 `(n,)`, and return their sums of `Task.metrics`."""
    job.world.progress.enter("data")
    values = forward_batch(job, model, read_samples(job.task.train_data, samples))
    return as_sums(values, job.task.reduction, job.task.train_data, samples)


def forward_batch(job: Job, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Move a batch to the device and return what `Task.loss_sums` does: sums, or means, of `Task.metrics`."""
    world, precision = job.world, job.config.train.precision
    batch = to_device(batch, world.device, precision)
    world.progress.enter("forward")
    with autocast(precision, world.device):
        return job.task.loss_sums(model, batch)


def to_device(batch: Batch, device: torch.device, precision: Precision) -> Batch:
    """Move a batch; its real numbers take the type of the weights where that is not the model's own."""
    dtype, is_gpu = own_type(precision), device.type == "cuda"
    if dtype is None and device.type == "cpu" and type(batch) is tuple and all(map(_is_on_cpu, batch)):
        return batch  # as it is, and nobody can change it

    def move(tensor: Tensor) -> Tensor:
        # In its own type: another one would be made on the host, in memory from which a copy is waited for.
        moved = tensor.to(device, non_blocking=is_gpu)
        return moved if dtype is None else moved.to(type_as(tensor, dtype))

    return map_tensors(move, batch)


def _is_on_cpu(part: object) -> bool:
    return type(part) is Tensor and part.is_cpu


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Return the context in which the model runs."""
    dtype = _CAST_TO.get(precision)
    if dtype is None and not torch.is_autocast_enabled(device.type):
        return _NO_CONTEXT
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)
