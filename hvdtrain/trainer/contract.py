"""What a recipe promises, checked on the first micro-batch: a mistake here makes wrong figures, not errors.

Sums are told from means by taking the same samples twice: a sum doubles, a mean stays. That needs no number of targets,
and holds with padding; a loss that does neither is left alone. Whether the parts of a micro-batch make its loss is
asked besides (`of_parts`): where they do not, the loss is another one on another number of ranks, which is said.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hvdtrain.data.draws import kept_random_state
from hvdtrain.data.nested import map_tensors, tensors_in
from hvdtrain.data.own_generators import generators_in
from hvdtrain.errors import ConfigError, DataError, HvdtrainError
from hvdtrain.models.compilation import uncompiled
from hvdtrain.models.kept import KeptState
from hvdtrain.models.walk import owned_by
from hvdtrain.trainer.batch_form import has_rows, read_first
from hvdtrain.trainer.of_parts import Drawn, why_not_of_parts
from hvdtrain.trainer.task import Batch, Task
from hvdtrain.trainer.values import count_targets

if TYPE_CHECKING:
    from hvdtrain.trainer.job import Job

# Rounding in bf16 is far below this, what separates a mean from a sum is far above.
_TOLERANCE = 0.02

_FAILED = object()

_COLLATE_DRAWS = (
    "WARNING: Task(collate=...) draws random numbers: they belong to a micro-batch and not to its samples, so that they"
    " are others on another number of ranks; draw in __getitem__ instead"
)

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
    precision = job.config.train.precision
    notes = world.together(lambda: check_loss(task, model, batch, forward, samples, precision), "contract.loss")
    if getattr(task.train_data, "collate_draws", False):
        notes = [*notes, _COLLATE_DRAWS]
    of_ranks = world.all_gather_object(notes, "contract.notes")
    kinds = {note[:30]: note for own in reversed(of_ranks) for note in own}  # figures differ on each
    for note in kinds.values():
        job.log.say(note)
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


def checked_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> torch.optim.Optimizer:
    """Return what a recipe's `build_optimizer` has returned, if the model can be trained by it.

    Raises:
        ConfigError: it is no optimizer, needs a closure, or moves what is not the model's and so in no checkpoint.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(f"build_optimizer returned a {type(optimizer).__name__}: return a torch.optim.Optimizer")
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ConfigError(
            f"build_optimizer returned a {type(optimizer).__name__}, whose step() computes the loss by itself, several"
            " times: it works in a loop of your own (World.wrap, step(closure)), not in a recipe"
        )
    own = set(model.parameters())
    for parameter in owned_by(optimizer):
        if parameter not in own:
            raise ConfigError(
                f"build_optimizer gave the optimizer a parameter of shape {tuple(parameter.shape)} that is not one of"
                " the model's: it would be in no checkpoint, and not alike on all ranks. Make it a part of the model"
            )
    return optimizer


def check_loss(
    task: Task,
    model: nn.Module,
    batch: Batch,
    forward: Forward,
    samples: Tensor | None = None,
    precision: str = "fp32",
) -> list[str]:
    """Check what `Task.loss_sums` returns for a micro-batch. Random state, model and batch are left as they were.

    A few forward passes, over a half of the micro-batch, over that half twice and over a few pairs of samples; none
    backward. Where they fail, as with samples that must come in pairs or for want of memory, nothing is said: the
    step's own pass will tell.

    Returns:
        What a person should know of it.

    Raises:
        ConfigError: it returns no dictionary of scalar tensors with all metrics, the loss does not depend on the
            weights, or a value is a mean where a sum is promised, or the other way round.
    """
    rows = max((len(tensor) for tensor in tensors_in(batch) if tensor.ndim), default=0)
    can_halve = all(has_rows(tensor, rows) and tensor.layout == torch.strided for tensor in tensors_in(batch))
    middle = -(-rows // 2) if can_halve else 0

    def part(start: int, end: int) -> Batch:
        return map_tensors(lambda tensor: tensor[start:end].clone(), batch)  # which the loss may write into

    with _undisturbed(model), uncompiled():
        had_none, drawn = not _have_gradients(model), Drawn(generators_in((model, task.loss_sums)))
        once = _values(forward, part(0, middle) if can_halve else map_tensors(torch.clone, batch))
        is_random = bool(drawn)
        if had_none and _have_gradients(model):
            raise ConfigError("loss_sums has called backward(): return the loss, and hvdtrain differentiates it")
        if once is _FAILED:
            return []
        _check_kinds(task, model, once)
        notes = [*_not_named(task, once)]
        if not can_halve:
            return notes
        with torch.no_grad():
            again = _values(forward, map_tensors(lambda tensor: torch.cat((tensor[:middle], tensor[:middle])), batch))
            _check_reduction(task, once, again)
            if rows > 1 and not is_random and _is_of_samples(task, samples, rows):
                notes.append(_note_on_parts(task, lambda *ends: _values(forward, part(*ends)), rows, precision))
    return [note for note in notes if note]


def _note_on_parts(task: Task, values_of: Callable[[int, int], Any], rows: int, precision: str) -> str:
    """Return a warning where parts of a micro-batch do not make its loss: pairs of samples, or else its halves.

    In pairs a label that is passed over, or another class's, weighs most. They are no more work than the micro-batch.
    """
    pairs = [(2 * i, 2 * i + 1, 2 * i + 2) for i in range(min(4, max(1, rows // 4), rows // 2))]
    has_worked = False
    for start, middle, end in [*pairs, (0, -(-rows // 2), rows)]:
        if has_worked and end == rows > 2:
            break
        values = [values_of(*ends) for ends in ((start, middle), (middle, end), (start, end))]
        if any(value is _FAILED for value in values):
            continue
        has_worked = True
        note = why_not_of_parts(task, (values[0], values[1]), values[2], (middle - start) / (end - start), precision)
        if note:
            return note
    return ""


def _not_named(task: Task, sums: Mapping[str, Any]) -> Iterator[str]:
    others = [str(name) for name in sums if name not in task.metrics]
    if others:
        yield (
            f"metrics:    loss_sums returns {', '.join(map(repr, others[:4]))}, too, which Task(metrics=...) does not"
            " name: not logged"
        )


def _is_of_samples(task: Task, samples: Tensor | None, rows: int) -> bool:
    """Return whether parts of a micro-batch weigh as many targets as they have rows, where means are weighed."""
    if task.reduction == "sum":
        return True
    return samples is not None and len(samples) == rows == count_targets(task.train_data, samples)


def _check_reduction(task: Task, once: Mapping[str, Any], again: Any) -> None:
    """Raise ConfigError where a value is a mean and a sum was promised, or the other way round."""
    for name in task.metrics if again is not _FAILED else ():
        single, doubled = float(once[name].detach()), float(again[name])
        if task.reduction == "mean":
            _check_mean(name, single, doubled)
        elif _is_mean(single, doubled):
            raise ConfigError(
                f"loss_sums returns a mean as '{name}' (the same samples twice give {doubled:.6g}, once"
                f" {single:.6g}): return the sum over the targets, as with reduction='sum'; hvdtrain divides it by"
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
    kept = KeptState(model)
    devices = sorted({parameter.device.index for parameter in model.parameters() if parameter.is_cuda})
    try:
        with kept_random_state(), torch.random.fork_rng(devices):
            model.eval()
            yield
    finally:
        for module, was_training in modes:
            module.training = was_training
        kept.put_back()
