"""The norms of gradients of small and large batches, from which the gradient noise scale is estimated. Collective."""

from __future__ import annotations

import torch
from torch import Tensor

from hvdtrain.optim.noise import Norms
from hvdtrain.trainer import Job
from hvdtrain.trainer.state import Training
from hvdtrain.trainer.step import forward_sums
from hvdtrain.world import World


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
        samples = job.order.global_batch(step * size + world.rank)[: small * parts]
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
    training.optimizer.zero_grad()
    positions = torch.arange(len(samples))
    targets = max(1, job.task.train_data.num_targets(samples))
    training.randomness.run(
        positions,
        (job.config.train.seed, 0),
        lambda: forward_sums(job, training.model, samples),
        lambda sums: (sums["loss"] / targets).backward(),
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
