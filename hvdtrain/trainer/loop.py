"""The loop: `fit` decides when to log, evaluate, save and stop; `train_step` takes one optimizer step.

The loss of a step is the mean over the *global* batch, exactly: each rank sums over its own part, and every rank knows
how many terms the whole batch has without asking, since that is a function of the sample indices. Steps drive the loop
and every collective is reached by every rank.
"""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from hvdtrain.config import Precision
from hvdtrain.data.dataset import contiguous_share, in_batches
from hvdtrain.errors import StopRequested
from hvdtrain.metrics import Stopwatch
from hvdtrain.schedule import learning_rate
from hvdtrain.stop import StopRequest
from hvdtrain.trainer.saver import Saver
from hvdtrain.trainer.state import Training, start_training
from hvdtrain.trainer.task import Batch, Job


def fit(job: Job) -> dict[str, float]:
    """Train to the last step, from `run_dir`'s newest checkpoint on, and return the last evaluation. Collective.

    Raises:
        UsageError: on all ranks alike, before the first step: settings, data and checkpoint do not fit together.
        StopRequested: on all ranks alike, after saving: a signal reached any rank, or the time is used up.
        CheckpointError: the last save failed.
    """
    config, log = job.config, job.log
    training = start_training(job)
    stopwatch = Stopwatch(training.step)
    log.begin(training.step, job.num_steps)
    if training.step >= job.num_steps:
        log.say(f"this run has finished before, at step {training.step}")
        return evaluate(job, training.model)
    saver = Saver(job)
    with saver, StopRequest(config.train.max_time_s) as request:
        while training.step < job.num_steps:
            agree = job.world.start_all_reduce(torch.tensor(float(request.reason is not None)), "max", "stop")
            train_step(job, training)
            step, is_last, is_stop = training.step, training.step == job.num_steps, bool(agree())
            if is_last or is_due(step, config.log.every):
                log.write(step, {**window_metrics(job, training, stopwatch), **saver.metrics()})
            evaluated: dict[str, float] = {}
            with stopwatch.paused():
                if is_last or (is_due(step, config.eval.every) and not is_stop):
                    evaluated = evaluate(job, training.model)
                if not is_last and evaluated:
                    log.write(step, evaluated)
                if is_last or is_stop or is_due(step, config.checkpoint.every):
                    saver.save(training, evaluated)
            if is_stop and not is_last:
                saver.finish()
                raise stopped(job, training.step, request)
        saver.finish()
    log.write(training.step, {**evaluated, **saver.metrics(), "time/train_s": stopwatch.seconds}, "finished")
    return evaluated


def stopped(job: Job, step: int, request: StopRequest) -> StopRequested:
    """Return the exception that ends all ranks alike; names the reason of the first rank that has one. Collective."""
    reasons = job.world.all_gather_object(request.reason, "stop.reason")
    rank, reason = next((rank, reason) for rank, reason in enumerate(reasons) if reason)
    return StopRequested(
        f"stopped at step {step} of {job.num_steps} on request ({reason}, rank {rank}) and saved in {job.run_dir}:"
        " the same command with this --run-dir goes on"
    )


def is_due(step: int, every: int | None) -> bool:
    """Tell whether something that happens every so many steps happens now."""
    return every is not None and step % every == 0


def train_step(job: Job, training: Training) -> None:
    """Take one optimizer step along the gradient of the mean loss over the global batch. Collective."""
    train, task, world, step = job.config.train, job.task, job.world, training.step
    training.optimizer.zero_grad()
    num_targets = task.train_data.num_targets(job.order.global_batch(step))
    for i, indices in enumerate(job.order.micro_batches(step, world.rank)):
        _seed_torch(train.seed, step, world.rank, i)
        batch = _to_device(task.train_data.batch(indices), world.device, train.precision)
        with _autocast(train.precision, world.device):
            sums = task.loss(training.model, batch)
        # The ranks' gradients are averaged, the loss is a sum: hence the number of ranks.
        training.scaler.scale(sums["loss"] * (world.size / num_targets)).backward()  # type: ignore[no-untyped-call]
        training.window += torch.stack([sums[name].detach().double() for name in task.metrics])
    training.optimizer.synchronize()
    training.scaler.unscale_(training.optimizer)
    if train.max_grad_norm is not None:
        training.grad_norm = nn.utils.clip_grad_norm_(training.model.parameters(), train.max_grad_norm)
    for group in training.optimizer.param_groups:
        group["lr"] = learning_rate(job.config.optim, step, job.num_steps)
    training.scaler.step(training.optimizer)
    training.scaler.update()
    training.step += 1
    training.window_targets += num_targets


def evaluate(job: Job, model: nn.Module) -> dict[str, float]:
    """Return `val/...`: means over all held-out targets, each counted once at any number of ranks. Collective."""
    task, world, precision = job.task, job.world, job.config.train.precision
    batch_size = job.config.eval.batch_size or job.plan.micro_batch_size
    share = contiguous_share(len(task.val_data), world.rank, world.size)
    # Sums of the metrics, then the number of targets.
    totals = torch.zeros(len(task.metrics) + 1, dtype=torch.float64, device=world.device)
    model.eval()
    with torch.no_grad():
        for indices in in_batches(share, batch_size):
            batch = _to_device(task.val_data.batch(indices), world.device, precision)
            with _autocast(precision, world.device):
                sums = task.loss(model, batch)
            totals[:-1] += torch.stack([sums[name].double() for name in task.metrics])
            totals[-1] += task.val_data.num_targets(indices)
    model.train()
    *sums_of_all, num_targets = world.all_reduce(totals, "sum", "evaluate").tolist()
    means = {name: total / num_targets for name, total in zip(task.metrics, sums_of_all, strict=True)}
    return {f"val/{name}": value for name, value in task.summarize(means).items()}


def window_metrics(job: Job, training: Training, stopwatch: Stopwatch) -> dict[str, float]:
    """Return the means since the last logged step, and begin a new window. Collective."""
    sums = job.world.all_reduce(training.window, "sum", "train.metrics").tolist()
    targets = training.window_targets
    metrics = {f"train/{name}": total / targets for name, total in zip(job.task.metrics, sums, strict=True)}
    metrics["train/lr"] = training.optimizer.param_groups[0]["lr"]
    if training.grad_norm is not None:
        metrics["train/grad_norm"] = float(training.grad_norm)
    step_s = stopwatch.lap(training.step)
    metrics[f"throughput/{job.task.unit}_per_s"] = (
        job.task.train_data.num_targets(job.order.global_batch(training.step - 1)) / step_s
    )
    metrics["time/step_s"] = step_s
    metrics["time/left_s"] = step_s * (job.num_steps - training.step)
    training.window.zero_()
    training.window_targets = 0
    return metrics


def _seed_torch(*place: int) -> None:
    """Derive torch's random state from the place in the run, not from its history: resuming needs no saved state."""
    digest = hashlib.blake2b(" ".join(map(str, place)).encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)


def _to_device(batch: Batch, device: torch.device, precision: Precision) -> Batch:
    """Move a batch; in fp64, its real numbers become fp64 too."""
    return tuple(
        tensor.to(device, torch.float64 if precision == "fp64" and tensor.is_floating_point() else None)
        for tensor in batch
    )


def _autocast(precision: Precision, device: torch.device) -> torch.autocast:
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)
