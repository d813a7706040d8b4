"""The end of a step: clip the averaged gradient, update the weights unless it is not finite, or far too long."""

from __future__ import annotations

import math
import operator
from typing import cast

import torch
from torch import Tensor, nn

from hvdtrain.optim.private_optimizer import can_skip_by_itself, is_looked_at, skipping_where
from hvdtrain.optim.schedule import learning_rate
from hvdtrain.trainer.component import Step
from hvdtrain.trainer.job import Job
from hvdtrain.trainer.outcome import Outcome
from hvdtrain.trainer.state import Training


def update(job: Job, training: Training, step: Step) -> None:
    """Move the weights along the averaged gradient, or leave them if it does not count, and end the step. Collective.

    Whether it is finite, and no longer than it may be, is known only where the gradient lies. To ask a GPU would mean
    to wait until it has computed all of the step, and to leave it idle afterwards. So an optimizer that can leave its
    weights alone by itself is given the answer as a tensor, components count with tensors, and the host learns of it
    one step later. Other optimizers must be asked here.

    Args:
        job: what is trained.
        training: what changes; the gradients are averaged, and of their own size.
        step: what is known of the step; learns the norm and whether it is finite.
    """
    optimizer, at_once = training.optimizer, job.world.reads_at_once
    by_itself = can_skip_by_itself(optimizer) and not at_once
    step.grad_norm, divisor = _clip(job, training, by_itself and not is_looked_at(optimizer))
    factor = math.prod((component.lr_factor() for component in training.acting("lr_factor")), start=job.lr_factor)
    rate = learning_rate(job.config.optim, training.step, job.num_steps) * factor
    training.rates.set(optimizer, rate)
    step.is_finite = training.strategy.agree(job.world, _counts(step, at_once))
    if by_itself:
        with skipping_where(optimizer, ~step.is_finite, divisor):
            optimizer.step()
    elif step.is_finite:  # on a GPU, this waits
        optimizer.step()
    step.outcome = Outcome(step.is_finite, step.grad_norm, at_once)
    training.step += 1
    training.strategy.after_update(job.world, training)
    training.after_update(step)


def _counts(step: Step, at_once: bool) -> Tensor:
    """Return whether a step counts, bool, a scalar; by a look at its norm, where that need not wait, much sooner."""
    norm, limit = step.grad_norm, step.norm_limit
    if at_once:
        value = norm.item()
        return _ANSWERS[math.isfinite(value) and value <= limit]
    return norm.isfinite() if limit == math.inf else norm.isfinite() & (norm <= limit)


_IS_SPARSE = operator.attrgetter("is_sparse")
# What torch adds to a norm before it divides by it.
_TORCHS_EPS = 1e-6
# Nobody writes into them.
_ANSWERS = {answer: torch.tensor(answer) for answer in (False, True)}


def _clip(job: Job, training: Training, by_optimizer: bool = False) -> tuple[Tensor, Tensor | None]:
    """Return the gradient's Euclidean norm; scale the gradient down to `max_grad_norm` if it is longer. Collective.

    Where the optimizer can do so, which reads and writes each number once less, return what it is to divide it by.
    """
    max_norm, strategy = job.config.train.max_grad_norm, training.strategy
    parameters = strategy.moved(training)
    gradients = [cast(Tensor, parameter.grad) for parameter in parameters]
    if not any(map(_IS_SPARSE, gradients)):
        norm = strategy.norm_of(job.world, gradients)
        if max_norm is not None and by_optimizer and norm.dtype != torch.float64:  # kernels take a number of fp32
            return norm, ((norm.float() + _TORCHS_EPS) / max_norm).clamp(min=1.0)  # as torch has it, the other way up
        if max_norm is not None and not (job.world.reads_at_once and _is_within(norm, max_norm)):
            nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm, None
    return _clip_sparse(parameters, max_norm), None


def _is_within(norm: Tensor, max_norm: float) -> bool:
    """Return whether torch would multiply gradients of this norm by 1: a pass over all of them that changes nothing."""
    return bool((max_norm / (norm + _TORCHS_EPS)).item() >= 1)


def _clip_sparse(parameters: list[nn.Parameter], max_norm: float | None) -> Tensor:
    """Do the same where some gradients are sparse."""
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()
    gradients = [cast(Tensor, parameter.grad) for parameter in parameters]
    # Of a sparse gradient, the rows that are there.
    values = [gradient.values() if gradient.is_sparse else gradient for gradient in gradients]
    norm = nn.utils.get_total_norm(values)
    if max_norm is not None:
        dense = [p for p in parameters if p.grad is not None and not p.grad.is_sparse]
        nn.utils.clip_grads_with_norm_(dense, max_norm, norm)
        for rows in (rows for rows, gradient in zip(values, gradients, strict=True) if gradient.is_sparse):
            rows.mul_(torch.clamp(max_norm / (norm + 1e-6), max=1.0))
    return norm
