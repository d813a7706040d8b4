"""All that changes while training: set up, saved and restored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hvdtrain.errors import ResumeError
from hvdtrain.optim.build import build_optimizer
from hvdtrain.rundir.checkpoint import load_model_weights
from hvdtrain.settings import to_dict
from hvdtrain.trainer.buffers import ChangingBuffers
from hvdtrain.trainer.job import Job
from hvdtrain.trainer.model import prepare_model
from hvdtrain.trainer.randomness import MicroBatchRandomness
from hvdtrain.trainer.reading import BatchReader
from hvdtrain.world import WrappedOptimizer, has_synchronized_layers

# Settings that may differ when a run goes on: they change when something happens, or where things lie, but not what a
# step computes. The data is compared by its fingerprint instead, the batch by the settled global batch size.
FREE_TO_CHANGE = (
    *("log", "eval", "checkpoint", "health", "data", "train.steps", "train.epochs", "train.max_time"),
    *("train.global_batch_size", "train.micro_batch_size", "train.accum_steps"),
    *("model.compile", "model.linear", "model.checkpoint_blocks", "model.loss_chunk"),
    *("optim.kernel", "comm.bucket_mib"),
)

_COUNTERS = ("step", "window_targets", "skipped", "skipped_in_a_row", "is_evaluation_due")


@dataclass(frozen=True)
class Verdict:
    """Whether a step's gradient was finite, and what counts if it was."""

    step: int
    is_finite: Tensor
    """On its way to the host, bool, a scalar."""
    arrived: torch.cuda.Event | None
    sums: Tensor
    """This rank's, of `Task.metrics`, float64 `(len(metrics),)`."""
    num_targets: int


@dataclass
class Training:
    """Model, optimizer and counters."""

    model: nn.Module
    optimizer: WrappedOptimizer
    scaler: torch.amp.GradScaler
    randomness: MicroBatchRandomness
    reader: BatchReader
    buffers: ChangingBuffers
    runs_in_step: bool
    """Ranks must put equally many micro-batches through the model, empty ones if need be."""
    window: Tensor
    """This rank's sums of `Task.metrics` since the last logged step, float64 `(len(metrics),)`."""
    norms: Tensor
    """Sums since the last logged step: mean squared norm of the ranks' own gradients, squared norm of their mean, and 1
    for each step that counts; float64 `(3,)`."""
    window_targets: int = 0
    """Targets of all ranks in the window."""
    step: int = 0
    """Optimizer steps completed."""
    grad_norm: Tensor | None = None
    """Euclidean norm of the last step's global gradient, before clipping."""
    skipped: int = 0
    """Steps of the window whose loss or gradient was not finite."""
    skipped_in_a_row: int = 0
    verdict: Verdict | None = None
    """On the last step, which is counted when it is heard."""
    is_evaluation_due: bool = False
    """A request to stop came before the evaluation after this step."""


def start_training(job: Job) -> Training:
    """Put model and optimizer on the device: rank 0's weights, or the newest checkpoint's, on every rank. Collective.

    Raises:
        ConfigError: the model, the optimizer or the ranks cannot do what the settings ask.
        ResumeError: the checkpoint belongs to another model, other data or other settings.
    """
    world, train, comm = job.world, job.config.train, job.config.comm
    model = world.together(lambda: prepare_model(job.task.model, job.config, world), "model")
    optimizer = world.together(lambda: build_optimizer(job.config.optim, model), "optimizer")
    accum_steps, compression = job.plan.accum_steps, comm.compression
    in_step = has_synchronized_layers(model)
    training = Training(
        model=model,
        optimizer=world.together(
            lambda: world.wrap(
                optimizer,
                model,
                accum_steps=accum_steps,
                compression=compression,
                op=comm.op,
                bucket_bytes=comm.bucket_mib << 20,
                has_square=job.config.health.noise_scale,
            ),
            "wrap",
        ),
        scaler=torch.amp.GradScaler(world.device.type, enabled=train.precision == "fp16"),
        randomness=MicroBatchRandomness(world.device),
        buffers=ChangingBuffers(model),
        reader=BatchReader(job, in_step),
        runs_in_step=in_step,
        window=torch.zeros(len(job.task.metrics), dtype=torch.float64, device=world.device),
        norms=torch.zeros(3, dtype=torch.float64, device=world.device),
    )
    found = world.together(lambda: _read_latest(job, model) if world.rank == 0 else None, "resume")
    state = world.broadcast_object(found, "resume.state")
    if state is not None:
        training.optimizer.load_state_dict(state["optimizer"])
        training.scaler.load_state_dict(state["scaler"])
        for name in _COUNTERS:
            setattr(training, name, state[name])
        training.window.copy_(_own_window(state["windows"], world.rank, world.size))
        if "norms" in state:
            training.norms.copy_(state["norms"])
    world.broadcast_state(model, training.optimizer)
    training.buffers = ChangingBuffers(model)  # all that has changed them so far does not count
    world.check_replicas(replicated_tensors(training), "start")
    return training


def _own_window(windows: Tensor, rank: int, size: int) -> Tensor:
    """Return what a rank had summed, so that the next mean is bitwise the same; on other ranks, rank 0 has it all."""
    if len(windows) == size:
        return windows[rank]
    return windows.sum(0) * (rank == 0)


def training_state(job: Job, training: Training, windows: Tensor) -> dict[str, Any]:
    """Return all but the weights; `windows` are those of the ranks, float64 `(world size, len(metrics))`."""
    return {
        **{name: getattr(training, name) for name in _COUNTERS},
        "optimizer": training.optimizer.state_dict(),
        "scaler": training.scaler.state_dict(),
        "windows": windows,
        "norms": training.norms,
        "config": to_dict(job.config),
        "global_batch_size": job.plan.global_batch_size,
        "fingerprint": job.task.fingerprint,
    }


def _read_latest(job: Job, model: nn.Module) -> dict[str, Any] | None:
    """Load the newest checkpoint's weights into `model` and return the rest of it; None where there is none."""
    checkpoint = job.run.checkpoints.load_newest(job.log.say)
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
        if then.get(name) != now.get(name) and not _is_in(name, (*FREE_TO_CHANGE, *job.allowed_changes))
    ]
    if state["global_batch_size"] != job.plan.global_batch_size:
        problems.append(f"the global batch was {state['global_batch_size']} and is {job.plan.global_batch_size} now")
    if state["fingerprint"] != job.task.fingerprint and "data" not in job.allowed_changes:
        problems.append("the training data is not the same (data)")
    if problems:
        raise ResumeError(
            f"{job.run_dir} was begun with other settings: {'; '.join(problems)}. Go on with the same ones"
            f" (--config {job.run.config}), choose another --run-dir, or allow a change of what is not"
            " the batch or the model with --allow-config-change SECTION.SETTING"
        )


def _is_in(name: str, settings: tuple[str, ...]) -> bool:
    return any(name == setting or name.startswith(f"{setting}.") for setting in settings)


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def replicated_tensors(training: Training) -> dict[str, Tensor]:
    """Return all that must be equal on all ranks."""
    tensors = model_tensors(training.model)
    names: dict[Tensor, str] = {parameter: name for name, parameter in training.model.named_parameters()}
    for parameter, entries in training.optimizer.state.items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer's {key} of {names.get(parameter, '?')}"] = value
    return tensors


def _flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat.update(_flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat
