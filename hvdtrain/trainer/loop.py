"""The loop: `fit` decides when to log, evaluate, save and stop; `train_step` takes one optimizer step.

The loss of a step is the mean over the *global* batch, exactly: each rank sums over its own part, and every rank knows
how many terms the whole batch has without asking, since that is a function of the sample indices. Steps drive the loop
and every collective is reached by every rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hvdtrain.data.dataset import contiguous_share, in_batches
from hvdtrain.errors import StopRequested
from hvdtrain.optim.noise import Norms, agreement, estimate
from hvdtrain.process.stop import StopRequest
from hvdtrain.settings import Precision
from hvdtrain.trainer.job import Job
from hvdtrain.trainer.model import own_type
from hvdtrain.trainer.saver import Saver
from hvdtrain.trainer.state import Training, model_tensors, start_training
from hvdtrain.trainer.stopwatch import Stopwatch
from hvdtrain.trainer.task import Batch, Evaluation
from hvdtrain.trainer.update import hear, update


@dataclass(frozen=True)
class _Run:
    """What belongs together while `fit` runs."""

    job: Job
    training: Training
    stopwatch: Stopwatch
    saver: Saver
    request: StopRequest


def fit(job: Job, begin: Callable[[], None] = lambda: None) -> dict[str, float]:
    """Train to the last step, from `run_dir`'s newest checkpoint on, and return the last evaluation. Collective.

    `begin` is called on every rank when nothing is refused any more, before the first step.

    Raises:
        UsageError: on all ranks alike, before the first step: settings, data and checkpoint do not fit together.
        StopRequested: on all ranks alike, after saving: a signal reached any rank, or the time is used up.
        DivergedError: on all ranks alike: too many steps in a row had a loss or gradient that is not finite, or the
            ranks' weights are no longer equal.
        CheckpointError: on all ranks alike: the last save failed.
    """
    training = start_training(job)
    stopwatch, evaluated = Stopwatch(training.step), {}
    begin()
    job.log.begin(training.step, job.num_steps)
    if training.step >= job.num_steps and not training.is_evaluation_due:
        job.log.say(f"this run has finished before, at step {training.step}")
        return evaluate(job, training.model)
    with Saver(job) as saver, StopRequest(job.config.train.max_time_s) as request:
        run = _Run(job, training, stopwatch, saver, request)
        if training.is_evaluation_due:
            evaluated = _evaluate_and_save(run, is_stop=False)
        while training.step < job.num_steps:
            has_request = torch.tensor(float(request.reason is not None))
            agree = job.world.start_all_reduce(has_request, "max", "stop")
            train_step(job, training)
            is_stop = bool(agree())
            if training.step == job.num_steps or is_due(training.step, job.config.log.every):
                job.log.write(training.step, {**window_metrics(job, training, stopwatch), **saver.metrics()})
            evaluated = _evaluate_and_save(run, is_stop)
        saver.finish()
        job.world.progress.leave()
    last = {**evaluated, **saver.metrics(), "time/train_s": stopwatch.seconds}
    job.log.write(training.step, last, "finished")
    return evaluated


def _evaluate_and_save(run: _Run, is_stop: bool) -> dict[str, float]:
    """Do after a step what is due; returns the evaluation, empty if there was none. Collective.

    A request to stop cuts an evaluation short. It is then due when the run goes on, before the next step.
    """
    job, training = run.job, run.training
    step, is_last = training.step, training.step == job.num_steps
    evaluated: dict[str, float] = {}
    with run.stopwatch.paused():
        if is_last or is_due(step, job.config.eval.every):
            evaluated = {} if is_stop else evaluate(job, training.model, run.request)
            training.is_evaluation_due = not evaluated
            is_stop = is_stop or not evaluated
        if evaluated and not is_last:
            job.log.write(step, evaluated)
        is_saving = is_last or is_stop or is_due(step, job.config.checkpoint.every)
        every = job.config.health.replica_check_every
        if every is not None and (is_saving or is_due(step, every)):
            job.world.check_replicas(model_tensors(training.model), "training")
        if is_saving:
            run.saver.save(training, evaluated)
    if is_stop and (not is_last or training.is_evaluation_due):
        run.saver.finish()
        raise stopped(job, step, run.request)
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
    """Take one optimizer step along the gradient of the mean loss over the global batch. Collective.

    Where the loss or the gradient of any rank is not finite, no rank updates its weights; that is told in the step
    after, or by `hear`.

    Raises:
        DivergedError: that has happened `--health.max-skipped-steps` times in a row.
    """
    world, step = job.world, training.step
    world.progress.begin_step(step)
    training.optimizer.zero_grad()
    samples = job.order.global_batch(step)
    num_targets = job.task.train_data.num_targets(samples)
    sums = torch.zeros_like(training.window)
    micro_batches = job.order.micro_batches(step, world.rank, training.runs_in_step)
    for place, positions in enumerate(micro_batches):
        sums += _micro_batch(job, training, (place, len(micro_batches) - 1), positions, num_targets)
    training.optimizer.synchronize()
    training.buffers.average(world)
    world.progress.enter("update")
    update(job, training, sums, num_targets, len(samples))


def _micro_batch(job: Job, training: Training, place: tuple[int, int], positions: Tensor, num_targets: int) -> Tensor:
    """Add a micro-batch's gradient; returns its sums of `Task.metrics`, float64 `(len(metrics),)`.

    Args:
        job: what is trained.
        training: what changes.
        place: the micro-batch's number in the step, and that of the last one.
        positions: where its samples stand in the global batch.
        num_targets: those of the global batch.
    """
    task, world, train = job.task, job.world, job.config.train

    def forward() -> dict[str, Tensor]:
        world.progress.enter("data")
        return forward_batch(job, training.model, training.reader.read(training.step, *place))

    def backward(sums: dict[str, Tensor]) -> None:
        world.progress.enter("backward")
        # The ranks' gradients are averaged, the loss is a sum: hence the number of ranks. Adding 0 x loss makes the
        # gradient of a loss that is not finite not finite either, which all ranks then see in the average.
        loss = sums["loss"] * (world.size / num_targets + 0 * sums["loss"].detach())
        training.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    sums = training.randomness.run(positions, (train.seed, training.step), forward, backward)
    return torch.stack([sums[name].detach().double() for name in task.metrics])


def forward_sums(job: Job, model: nn.Module, samples: Tensor) -> dict[str, Tensor]:
    """Read `samples`, int64 `(n,)`, and return their sums of `Task.metrics`."""
    job.world.progress.enter("data")
    return forward_batch(job, model, job.task.train_data.batch(samples))


def forward_batch(job: Job, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Move a batch to the device and return its sums of `Task.metrics`."""
    world, precision = job.world, job.config.train.precision
    batch = _to_device(batch, world.device, precision)
    world.progress.enter("forward")
    with _autocast(precision, world.device):
        return job.task.loss_sums(model, batch)


def noise_metrics(job: Job, training: Training) -> dict[str, float]:
    """Return the gradient noise scale of the window, and how far the ranks' gradients agree, if asked for."""
    small, large, count = training.norms.tolist()
    if count == 0:
        return {}
    norms, size = Norms(small / count, large / count), job.world.size
    batch = job.plan.global_batch_size
    signal, variance = estimate([norms], batch / size, batch)
    noise = variance / signal if signal > 0 else math.inf
    return {"train/noise_scale": noise, "train/gradient_agreement": agreement(norms, size)}


def evaluate(job: Job, model: nn.Module, request: StopRequest | None = None) -> dict[str, float]:
    """Return `val/...`: means over all held-out targets, each counted once at any number of ranks. Collective.

    Returns nothing if a rank has a request to stop before the end.
    """
    task = job.task
    held_out = Evaluation(data=task.val_data, loss_sums=task.loss_sums, metrics=task.metrics)
    means: dict[str, float] = {}
    for number, part in enumerate((held_out, *task.evaluations)):
        found = _means(job, model, part, request, f"evaluate.{number}")
        if found is None:
            return {}
        means.update(found)
    return {f"val/{name}": value for name, value in task.summarize(means).items()}


def _means(
    job: Job, model: nn.Module, part: Evaluation, request: StopRequest | None, name: str
) -> dict[str, float] | None:
    """Return means over all targets; None if a rank has a request to stop before the end. Collective."""
    world, precision = job.world, job.config.train.precision
    batch_size = job.config.eval.batch_size or job.plan.micro_batch_size
    batches = in_batches(contiguous_share(len(part.data), world.rank, world.size), batch_size)
    largest_share = -(-len(part.data) // world.size)
    # Sums of the metrics, then the number of targets.
    totals = torch.zeros(len(part.metrics) + 1, dtype=torch.float64, device=world.device)
    model.eval()
    with torch.no_grad():
        for i in range(-(-largest_share // batch_size)):
            has_request = torch.tensor(float(request is not None and request.reason is not None))
            agree = world.start_all_reduce(has_request, "max", f"{name}.stop")
            world.progress.enter("evaluation")
            for indices in batches[i : i + 1]:  # a rank may have one batch less than others
                batch = _to_device(part.data.batch(indices), world.device, precision)
                with _autocast(precision, world.device):
                    sums = part.loss_sums(model, batch)
                totals[:-1] += torch.stack([sums[key].double() for key in part.metrics])
                totals[-1] += part.data.num_targets(indices)
            if agree():
                model.train()
                return None
    model.train()
    *sums_of_all, num_targets = world.all_reduce(totals, "sum", name).tolist()
    return {key: total / num_targets for key, total in zip(part.metrics, sums_of_all, strict=True)}


def window_metrics(job: Job, training: Training, stopwatch: Stopwatch) -> dict[str, float]:
    """Return the means since the last logged step, and begin a new window. Collective.

    Raises:
        DivergedError: as `train_step`.
    """
    hear(job, training)
    sums = job.world.all_reduce(training.window, "sum", "train.metrics").tolist()
    metrics: dict[str, float] = {}
    if training.window_targets:
        means = {name: total / training.window_targets for name, total in zip(job.task.metrics, sums, strict=True)}
        metrics = {f"train/{name}": mean for name, mean in means.items()}
    metrics["train/lr"] = training.optimizer.param_groups[0]["lr"]
    if training.grad_norm is not None:
        metrics["train/grad_norm"] = float(training.grad_norm)
    metrics.update(noise_metrics(job, training))
    if training.skipped:
        metrics["train/skipped_steps"] = training.skipped
    step_s = stopwatch.lap(training.step)
    metrics[f"throughput/{job.task.unit}_per_s"] = (
        job.task.train_data.num_targets(job.order.global_batch(training.step - 1)) / step_s
    )
    metrics["time/step_s"] = step_s
    metrics["time/left_s"] = step_s * (job.num_steps - training.step)
    training.window.zero_()
    training.norms.zero_()
    training.window_targets = training.skipped = 0
    return metrics


def _to_device(batch: Batch, device: torch.device, precision: Precision) -> Batch:
    """Move a batch; its real numbers take the type of the weights where that is not the model's own."""
    dtype = own_type(precision)
    return tuple(
        tensor.to(device, dtype if tensor.is_floating_point() else None, non_blocking=device.type == "cuda")
        for tensor in batch
    )


def _autocast(precision: Precision, device: torch.device) -> torch.autocast:
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)
