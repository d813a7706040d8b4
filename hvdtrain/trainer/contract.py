"""What a recipe promises, checked on the first micro-batch: a mistake here makes wrong figures, not errors.

Sums are told from means by taking the same samples twice: a sum doubles, a mean stays. That needs no number of targets,
and holds with padding; a loss that does neither, such as a contrastive one, is left alone.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from hvdtrain.data.nested import leaves_in, map_tensors, tensors_in
from hvdtrain.data.readers import read_samples
from hvdtrain.data.stream import StreamSamples
from hvdtrain.data.users import MapSamples
from hvdtrain.errors import ConfigError, DataError, HvdtrainError
from hvdtrain.models.compilation import uncompiled
from hvdtrain.models.walk import owned_by
from hvdtrain.trainer.task import Batch, Task

if TYPE_CHECKING:
    from hvdtrain.trainer.job import Job

# Rounding in bf16 is far below this, what separates a mean from a sum is far above.
_TOLERANCE = 0.02

_FAILED = object()

Forward = Callable[[Batch], Mapping[str, Tensor]]
"""Returns `Task.loss_sums` of a batch that lies on the CPU."""


def first_batch(job: Job, model: nn.Module, samples: Tensor, read: Callable[[], Any], forward: Forward) -> Batch:
    """Return the first micro-batch of this rank, after it and the loss of it were checked. Collective.

    Args:
        job: what is trained.
        model: as it is trained.
        samples: indices of the micro-batch's samples, int64 `(n,)`.
        read: returns `train_data.batch(samples)`, perhaps by another thread.
        forward: as `Forward`.

    Raises:
        UsageError: on all ranks alike: the recipe breaks its contract.
    """
    task, world = job.task, job.world
    batch = world.together(lambda: read_first(task, samples, read), "contract.data")
    world.together(lambda: check_loss(task, model, batch, forward), "contract.loss")
    return batch


def check_task(task: Task) -> None:
    """Check what can be seen before anything is read.

    Raises:
        DataError: a data set is empty.
        ConfigError: no metric is the loss.
    """
    sets = {"train_data": task.train_data, "val_data": task.val_data}
    sets.update({f"evaluations[{i}].data": part.data for i, part in enumerate(task.evaluations)})
    for name, data in sets.items():
        if len(data) == 0:
            raise DataError(f"the recipe's {name} is empty: it has no samples")
    if "loss" not in task.metrics:
        raise ConfigError(f"Task.metrics is {task.metrics}: one of them must be 'loss', which is minimised")


def owned(optimizer: torch.optim.Optimizer, model: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer.

    Raises:
        ConfigError: it is none, or moves what is not the model's, which no checkpoint would hold.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(f"build_optimizer returned a {type(optimizer).__name__}: return a torch.optim.Optimizer")
    own = set(model.parameters())
    for parameter in owned_by(optimizer):
        if parameter not in own:
            raise ConfigError(
                f"build_optimizer gave the optimizer a parameter of shape {tuple(parameter.shape)} that is not one of"
                " the model's: it would be in no checkpoint, and not alike on all ranks. Make it a part of the model"
            )
    return optimizer


def read_first(task: Task, samples: Tensor, read: Callable[[], Any]) -> Batch:
    """Return the first micro-batch of this rank, as `read` reads it.

    Args:
        task: what is trained.
        samples: indices of its samples, int64 `(n,)`.
        read: returns `task.train_data.batch(samples)`, perhaps by another thread.

    Raises:
        DataError: it holds no tensors with `n` rows each, or the samples differ in shape.
    """
    try:
        batch = read()
    except HvdtrainError:
        raise
    except (RuntimeError, ValueError) as error:
        _explain_shapes(task, samples, error)
        raise
    _check_rows(task, batch, len(samples))
    return batch


def _check_rows(task: Task, batch: Batch, num_samples: int) -> None:
    """Raise DataError where a batch holds no tensors, or its data set's own tensors have other rows than samples."""
    is_collated = isinstance(task.train_data, (MapSamples, StreamSamples))
    name = "collate" if is_collated else f"{type(task.train_data).__name__}.batch"
    tensors = list(tensors_in(batch))
    if any(isinstance(leaf, np.ndarray) for leaf in leaves_in(batch)):
        raise DataError(f"{name} returned a numpy array among its values: make it a tensor with torch.from_numpy")
    if not tensors:
        raise DataError(
            f"{name} returned a {type(batch).__name__} without tensors: return tensors, as in `return inputs, targets`,"
            " or a list or dictionary of them"
        )
    for i, tensor in enumerate([] if is_collated else tensors):  # batches of graphs, say, have rows of another kind
        if not _has_rows(tensor, num_samples):
            raise DataError(
                f"{name} returned a tensor number {i} of shape {tuple(tensor.shape)} for {num_samples} samples:"
                f" its first dimension must be {num_samples}"
            )


def _has_rows(tensor: Tensor, number: int) -> bool:
    return tensor.ndim > 0 and len(tensor) == number


def _explain_shapes(task: Task, samples: Tensor, error: Exception) -> None:
    """Raise DataError where samples cannot be read together, but each alone, because their shapes differ."""
    try:
        alone = [read_samples(task.train_data, samples[i : i + 1]) for i in range(len(samples))]
        shapes = [[tuple(tensor.shape[1:]) for tensor in tensors_in(batch)] for batch in alone]
    except Exception:
        return
    other = next((i for i, shape in enumerate(shapes) if shape != shapes[0]), None)
    if other is not None:
        raise DataError(
            f"samples {int(samples[0])} and {int(samples[other])} differ in shape ({_listed(shapes[0])} and"
            f" {_listed(shapes[other])}): crop, resize or pad them in {type(task.train_data).__name__}.batch"
        ) from error


def _listed(shapes: list[tuple[int, ...]]) -> str:
    return ", ".join(map(str, shapes))


def check_loss(task: Task, model: nn.Module, batch: Batch, forward: Forward) -> None:
    """Check what `Task.loss_sums` returns for a micro-batch. Random state, modes and buffers are left as they were.

    Two forward passes, over a half of the micro-batch and over that half twice; none backward. Where they fail, as with
    samples that must come in pairs or for want of memory, nothing is said: the step's own pass will tell.

    Raises:
        ConfigError: it returns no dictionary of scalar tensors with all metrics, the loss does not depend on the
            weights, or a value is a mean where a sum is promised, or the other way round.
    """
    rows = max((len(tensor) for tensor in tensors_in(batch) if tensor.ndim), default=0)
    can_halve = all(_has_rows(tensor, rows) and tensor.layout == torch.strided for tensor in tensors_in(batch))
    half = map_tensors(lambda tensor: tensor[: -(-rows // 2)], batch) if can_halve else batch
    with _undisturbed(model), uncompiled():
        had_none = not _have_gradients(model)
        once = _values(forward, half)
        if had_none and _have_gradients(model):
            raise ConfigError("loss_sums has called backward(): return the loss, and hvdtrain differentiates it")
        if once is _FAILED:
            return
        _check_kinds(task, model, once)
        sums = {name: float(once[name].detach()) for name in task.metrics}
        if not can_halve:
            return
        with torch.no_grad():
            again = _values(forward, map_tensors(lambda tensor: torch.cat((tensor, tensor)), half))
    for name in task.metrics if again is not _FAILED else ():
        doubled = float(again[name])
        if task.reduction == "mean":
            _check_mean(name, sums[name], doubled)
        elif _is_mean(sums[name], doubled):
            raise ConfigError(
                f"loss_sums returns a mean as '{name}' (the same samples twice give {doubled:.6g}, once"
                f" {sums[name]:.6g}): return the sum over the targets, as with reduction='sum'; hvdtrain divides it by"
                " the number of targets of the whole global batch. Or say so: Task(reduction='mean')"
            )


def _check_mean(name: str, once: float, twice: float) -> None:
    """Raise ConfigError where a mean is promised, and the value is a sum."""
    if _is_mean(2 * once, twice):
        raise ConfigError(
            f"loss_sums returns a sum as '{name}' (the same samples twice give {twice:.6g}, once {once:.6g}), and the"
            " task says reduction='mean': return the mean over the batch's targets, or leave out reduction="
        )


def _have_gradients(model: nn.Module) -> bool:
    return any(parameter.grad is not None for parameter in model.parameters())


def _values(forward: Forward, batch: Batch) -> Any:
    try:
        return forward(batch)
    except HvdtrainError:
        raise
    except Exception:
        return _FAILED


def _is_mean(once: float, twice: float) -> bool:
    scale = abs(once)
    if not scale > 0 or scale == float("inf"):  # nan, too, is told by the step
        return False
    return abs(twice - once) <= _TOLERANCE * scale


def _check_kinds(task: Task, model: nn.Module, sums: Any) -> None:
    if not isinstance(sums, Mapping):
        raise ConfigError(
            f"loss_sums returned a {type(sums).__name__}: return a dictionary of sums, as in"
            f" {{{', '.join(f'{name!r}: ...' for name in task.metrics)}}}"
        )
    for name in task.metrics:
        if name not in sums:
            raise ConfigError(
                f"loss_sums returned {', '.join(map(repr, sums)) or 'nothing'}, and Task.metrics names '{name}' too:"
                " return a sum for it, or leave it out there"
            )
        value = sums[name]
        if not isinstance(value, Tensor):
            raise ConfigError(
                f"loss_sums returned a {type(value).__name__} as '{name}': return the tensor itself, without .item()"
            )
        if value.numel() != 1:
            raise ConfigError(
                f"loss_sums returned a tensor of shape {tuple(value.shape)} as '{name}': return one number, its .sum()"
            )
        if value.is_complex():
            raise ConfigError(
                f"loss_sums returned a complex number as '{name}': return a real one, such as its .abs() or .real"
            )
    has_weights = any(parameter.requires_grad for parameter in model.parameters())
    if not has_weights:
        raise ConfigError(
            "no parameter of the model learns: all have requires_grad=False, or there are none. Leave some unfrozen"
        )
    if not sums["loss"].requires_grad:
        raise ConfigError(
            "the 'loss' that loss_sums returned does not depend on the weights: leave out .detach(), torch.no_grad()"
            " and torch.tensor(...) on its way"
        )


@contextlib.contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode, without dropout, and afterwards everything back as it was."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    python, numpy = random.getstate(), np.random.get_state()
    devices = sorted({parameter.device.index for parameter in model.parameters() if parameter.is_cuda})
    try:
        with torch.random.fork_rng(devices):
            model.eval()
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for module, was_training in modes:
            module.training = was_training
        with torch.no_grad():
            for buffer, before in buffers:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)
