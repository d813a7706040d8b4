"""Learning-rate schedules: pure functions of the step. Standard library only."""

from __future__ import annotations

import math

from hvdtrain.errors import ConfigError, counted
from hvdtrain.settings import OptimConfig


def learning_rate(optim: OptimConfig, step: int, num_steps: int) -> float:
    """Return the learning rate of the update that follows `step` completed ones.

    Warm-up is linear and ends at the peak: update `s` (from 0) uses `peak (s + 1) / warmup_steps`. Afterwards, with
    `progress` from 0 (end of the warm-up) to 1 (last update), cosine (arXiv:1608.03983, eq. 5), linear and wsd
    (warm-up, stable, decay: arXiv:2404.06395, section 4) fall from the peak to `final_lr_fraction` of it. step and
    multistep multiply by `decay_factor` where a share of all `num_steps` is reached, warm-up included. plateau depends
    on evaluations: `trainer.plateau` multiplies what is constant here.
    """
    warmup = warmup_steps(optim, num_steps)
    if step < warmup:
        return optim.peak_lr * (step + 1) / warmup
    if optim.schedule in ("step", "multistep", "plateau"):
        return optim.peak_lr * float(optim.decay_factor ** _num_drops(optim, step, num_steps))
    progress = min(1.0, (step - warmup) / max(1, num_steps - 1 - warmup))
    final = optim.final_lr_fraction
    return optim.peak_lr * (final + (1 - final) * _height(optim, progress, num_steps))


def _num_drops(optim: OptimConfig, step: int, num_steps: int) -> int:
    """Return how often the rate was multiplied before the update that follows `step` completed ones."""
    if optim.schedule == "multistep":
        return sum(step >= round(share * num_steps) for share in optim.milestones)
    if optim.schedule == "step":
        return step // max(1, round(optim.step_fraction * num_steps))
    return 0


def warmup_steps(optim: OptimConfig, num_steps: int) -> int:
    """Return the steps of the warm-up: those that were given, or a share of the run that leaves it at least one."""
    if optim.warmup_steps is not None:
        return optim.warmup_steps
    return min(round(optim.warmup_fraction * num_steps), num_steps - 1)


def describe_schedule(optim: OptimConfig, num_steps: int) -> str:
    """Return what a person should know: `cosine after 50 steps of warm-up`."""
    warmup = warmup_steps(optim, num_steps)
    if warmup == 0:
        return optim.schedule
    return f"{optim.schedule} after {counted(warmup, 'step')} of warm-up"


def lr_factor(optim: OptimConfig, global_batch_size: int) -> float:
    """Return by what `--optim.lr-rule` multiplies the learning rate.

    linear: in proportion to the batch, so that one step moves as far as several of a smaller batch (arXiv:1706.02677,
    section 2.1); sqrt: so that the noise of a step stays the same (arXiv:1404.5997, section 5).
    """
    if optim.lr_rule == "none" or optim.reference_batch is None:
        return 1.0
    ratio = global_batch_size / optim.reference_batch
    return ratio if optim.lr_rule == "linear" else math.sqrt(ratio)


def check_schedule(optim: OptimConfig, num_steps: int) -> None:
    """Raise ConfigError where the warm-up does not fit into the run."""
    if optim.warmup_steps and optim.warmup_steps >= num_steps:
        raise ConfigError(
            f"--optim.warmup-steps {optim.warmup_steps} leaves nothing of the run's {num_steps} steps:"
            f" use fewer than {num_steps}"
        )


def _height(optim: OptimConfig, progress: float, num_steps: int) -> float:
    """Return the height above the final rate, from 1 at the peak to 0."""
    if optim.schedule == "constant":
        return 1.0
    if optim.schedule == "linear":
        return 1 - progress
    if optim.schedule == "cosine":
        return (1 + math.cos(math.pi * progress)) / 2
    after_warmup = max(1, num_steps - warmup_steps(optim, num_steps))
    decay_share = min(1.0, optim.decay_fraction * num_steps / after_warmup)
    return min(1.0, (1 - progress) / decay_share)
