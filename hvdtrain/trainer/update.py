"""The end of a step: clip, update unless something is not finite, and count.

Whether it is known only where the gradient lies. An optimizer that can leave its weights alone by itself is told there,
so that a GPU need not be waited for: the host hears of it in the next step, or when it counts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hvdtrain.errors import DivergedError
from hvdtrain.optim.schedule import learning_rate
from hvdtrain.trainer.job import Job
from hvdtrain.trainer.state import Training, Verdict


def update(job: Job, training: Training, sums: Tensor, num_targets: int, num_samples: int) -> None:
    """Move the weights along the averaged gradient, or leave them if it is not finite, and end the step. Collective.

    Args:
        job: what is trained.
        training: what changes; the gradients are averaged.
        sums: this rank's of `Task.metrics`, float64 `(len(metrics),)`.
        num_targets: those of the global batch.
        num_samples: of the global batch.

    Raises:
        DivergedError: as `hear`.
    """
    hear(job, training)
    optimizer, scaler, step = training.optimizer, training.scaler, training.step
    scaler.unscale_(optimizer)
    training.grad_norm = _clip(training.model, job.config.train.max_grad_norm)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(job.config.optim, step, job.num_steps) * job.lr_factor
    # Every rank holds the same averaged gradient: no rank need ask another whether it is finite.
    is_finite = training.grad_norm.isfinite()
    if can_skip_by_itself(training):
        # The attribute by which torch's GradScaler tells fused optimizers.
        optimizer.found_inf = (~is_finite).float()  # type: ignore[attr-defined]
        optimizer.step()
        del optimizer.found_inf  # type: ignore[attr-defined]
    elif is_finite:  # on a GPU, this waits
        scaler.step(optimizer)
    scaler.update()
    training.window += sums.where(is_finite, 0)
    _note_norms(job, training, num_samples, is_finite)
    training.step += 1
    arrived = None
    if is_finite.is_cuda:
        is_finite, arrived = is_finite.to("cpu", non_blocking=True), torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record()
    training.verdict = Verdict(training.step, is_finite, arrived, sums, num_targets)


def can_skip_by_itself(training: Training) -> bool:
    """Tell whether the optimizer takes a step or not as a tensor says; the loss scaler is asked on the host."""
    return not training.scaler.is_enabled() and getattr(training.optimizer, "_step_supports_amp_scaling", False)


def hear(job: Job, training: Training) -> None:
    """Count the last step, or tell that it was skipped; called before anything is logged or saved. Collective.

    Raises:
        DivergedError: as many steps in a row as `--health.max-skipped-steps` were skipped.
    """
    verdict, training.verdict = training.verdict, None
    if verdict is None:
        return
    if verdict.arrived is not None:
        verdict.arrived.synchronize()
    if verdict.is_finite:
        training.skipped_in_a_row = 0
        training.window_targets += verdict.num_targets
    else:
        _skip(job, training, verdict)


def _clip(model: nn.Module, max_norm: float | None) -> Tensor:
    """Return the gradient's Euclidean norm; scale the gradient down to `max_norm` if it is longer."""
    for parameter in model.parameters():
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    # Of a sparse gradient, the rows that are there.
    values = [gradient._values() if gradient.is_sparse else gradient for gradient in gradients]
    norm = nn.utils.get_total_norm(values)
    if max_norm is not None:
        torch._foreach_mul_(values, torch.clamp(max_norm / (norm + 1e-6), max=1.0))
    return norm


def _note_norms(job: Job, training: Training, num_samples: int, is_finite: Tensor) -> None:
    """Add up the norms of which the gradient noise scale is made, of full batches."""
    square, norm = training.optimizer.mean_square, training.grad_norm
    if square is None or norm is None or num_samples < job.plan.global_batch_size:
        return
    # The optimizer's gradients were unscaled, what the ranks have sent was not.
    square = square / training.scaler.get_scale() ** 2 if training.scaler.is_enabled() else square
    norms = torch.stack([square, norm.double().square(), torch.ones_like(square)])
    training.norms += norms.where(is_finite, 0)


def _skip(job: Job, training: Training, verdict: Verdict) -> None:
    """Count and tell that a step was skipped. Collective."""
    training.skipped += 1
    training.skipped_in_a_row += 1
    loss = float(verdict.sums[job.task.metrics.index("loss")])
    losses = job.world.all_gather_object(loss, "skip")
    ranks = [str(rank) for rank, loss in enumerate(losses) if not torch.tensor(loss).isfinite()]
    who = f"the loss on rank {', '.join(ranks)}" if ranks else "the gradient"
    scale = f"; the loss scale is now {training.scaler.get_scale():g}" if training.scaler.is_enabled() else ""
    job.log.say(f"WARNING: step {verdict.step} is skipped on all ranks: {who} is not finite{scale}")
    if training.skipped_in_a_row >= job.config.health.max_skipped_steps:
        raise DivergedError(
            f"{training.skipped_in_a_row} steps in a row were skipped, up to step {verdict.step}: {who} is not finite."
            f" The checkpoints in {job.run_dir} are good; try a lower --optim.peak-lr, a longer --optim.warmup-steps or"
            " --train.precision fp32, and look at the data of these steps"
        )
