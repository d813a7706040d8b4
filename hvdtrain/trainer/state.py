"""All that changes while training: set up, saved and restored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hvdtrain.checkpoint import load_model_weights, load_newest
from hvdtrain.config import to_dict
from hvdtrain.dist import WrappedOptimizer
from hvdtrain.errors import ResumeError
from hvdtrain.optimizer import build_optimizer
from hvdtrain.trainer.task import Job

# Settings that may differ when a run goes on: they change when something happens, or where things lie, but not what a
# step computes. The data is compared by its fingerprint instead, the batch by the settled global batch size.
FREE_TO_CHANGE = (
    *("log", "eval", "checkpoint", "data", "train.steps", "train.epochs", "train.max_time"),
    *("train.global_batch_size", "train.micro_batch_size", "train.accum_steps"),
)


@dataclass
class Training:
    """Model, optimizer and counters."""

    model: nn.Module
    optimizer: WrappedOptimizer
    scaler: torch.amp.GradScaler
    window: Tensor
    """This rank's sums of `Task.metrics` since the last logged step, float64 `(len(metrics),)`."""
    window_targets: int = 0
    """Targets of all ranks in the window."""
    step: int = 0
    """Optimizer steps completed."""
    grad_norm: Tensor | None = None
    """Euclidean norm of the last step's global gradient, before clipping."""


def start_training(job: Job) -> Training:
    """Put model and optimizer on the device: rank 0's weights, or the newest checkpoint's, on every rank. Collective.

    Raises:
        ResumeError: the checkpoint belongs to another model, other data or other settings.
    """
    world, train = job.world, job.config.train
    model = job.task.model.to(world.device, torch.float64 if train.precision == "fp64" else None)
    optimizer = build_optimizer(job.config.optim, model)
    training = Training(
        model=model,
        optimizer=world.wrap(
            optimizer, model, accum_steps=job.plan.accum_steps, compression=job.config.comm.compression
        ),
        scaler=torch.amp.GradScaler(world.device.type, enabled=train.precision == "fp16"),
        window=torch.zeros(len(job.task.metrics), dtype=torch.float64, device=world.device),
    )
    found = world.together(lambda: _read_latest(job, model) if world.rank == 0 else None, "resume")
    state = world.broadcast_object(found, "resume.state")
    if state is not None:
        training.step = state["step"]
        training.optimizer.load_state_dict(state["optimizer"])
        training.scaler.load_state_dict(state["scaler"])
        training.window_targets = state["window_targets"]
        if world.rank == 0:
            training.window.copy_(state["window"])
    world.broadcast_state(model, training.optimizer)
    return training


def training_state(job: Job, training: Training, window: Tensor) -> dict[str, Any]:
    """Return all but the weights; `window` is the sum of the ranks' windows, float64 `(len(metrics),)`."""
    return {
        "step": training.step,
        "optimizer": training.optimizer.state_dict(),
        "scaler": training.scaler.state_dict(),
        "window": window,
        "window_targets": training.window_targets,
        "config": to_dict(job.config),
        "global_batch_size": job.plan.global_batch_size,
        "fingerprint": job.task.fingerprint,
    }


def _read_latest(job: Job, model: nn.Module) -> dict[str, Any] | None:
    """Load the newest checkpoint's weights into `model` and return the rest of it; None where there is none."""
    checkpoint = load_newest(job.run_dir, job.log.say)
    if checkpoint is None:
        return None
    _check_fits(job, checkpoint.state)
    load_model_weights(model, checkpoint.weights)
    return checkpoint.state


def _check_fits(job: Job, state: dict[str, Any]) -> None:
    then, now = _flatten(state["config"]), _flatten(to_dict(job.config))
    problems = [
        f"{name} was {then.get(name)} and is {now.get(name)} now"
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name) and not _is_free(name)
    ]
    if state["global_batch_size"] != job.plan.global_batch_size:
        problems.append(f"the global batch was {state['global_batch_size']} and is {job.plan.global_batch_size} now")
    if state["fingerprint"] != job.task.fingerprint:
        problems.append("the training data is not the same")
    if problems:
        raise ResumeError(
            f"{job.run_dir} was begun with other settings: {'; '.join(problems)}. Go on with the same ones"
            f" (--config {job.run_dir / 'config.toml'}), or choose another --run-dir"
        )


def _is_free(name: str) -> bool:
    return any(name == free or name.startswith(f"{free}.") for free in FREE_TO_CHANGE)


def _flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat.update(_flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat
