"""Evaluation on held-out data: means over all targets, each counted once at any number of ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from hvdtrain.data.loader import Loader
from hvdtrain.data.order import EvaluationOrder
from hvdtrain.models.compilation import is_compiled
from hvdtrain.process.stop import StopRequest
from hvdtrain.trainer.job import Job, metric_names
from hvdtrain.trainer.modes import in_eval_mode
from hvdtrain.trainer.randomness import MicroBatchRandomness
from hvdtrain.trainer.state import Training
from hvdtrain.trainer.step import autocast, to_device
from hvdtrain.trainer.task import Evaluation
from hvdtrain.trainer.values import as_figure, as_sum, as_sums, count_targets
from hvdtrain.world import World


def evaluate(job: Job, training: Training, request: StopRequest | None = None) -> dict[str, float]:
    """Return `val/...` of the weights that are evaluated: the model's own, or their moving average. Collective.

    Returns nothing if a rank has a request to stop before the end. Means over no targets are not a number.
    """
    task = job.task
    held_out = Evaluation(data=task.val_data, loss_sums=task.loss_sums, metrics=task.metrics, reduction=task.reduction)
    means: dict[str, float] = {}
    weights = training.strategy.made_equal(job.world, training), training.with_evaluated_weights()
    for component in training.components:
        component.before_evaluation(training)
    with weights[0], weights[1], in_eval_mode(training.model), torch.no_grad():
        for number, part in enumerate((held_out, *task.evaluations)):
            name = f"evaluate.{number}"
            key = (name, _order(job, part))
            if key not in training.held_out:
                training.held_out[key] = _loader(job, part)
            found = _means(job, training.model, part, training.held_out[key], request, name)
            if found is None:
                return {}
            means.update(found)
    return {f"val/{name}": as_figure(value, name) for name, value in task.summarize(means).items()}


def _order(job: Job, part: Evaluation) -> EvaluationOrder:
    batch_size = job.config.eval.batch_size or job.plan.micro_batch_size
    return EvaluationOrder(len(part.data), batch_size, job.world.size, job.config.train.seed)


def _loader(job: Job, part: Evaluation) -> Loader:
    world = job.world
    return Loader(part.data, _order(job, part), world.rank, pin_memory=world.device.type == "cuda", reading=job.reading)


def _means(
    job: Job, model: nn.Module, part: Evaluation, loader: Loader, request: StopRequest | None, name: str
) -> dict[str, float] | None:
    """Return means over all targets; None if a rank has a request to stop before the end. Collective."""
    world, order = job.world, _order(job, part)
    batches = [request.samples for request in order.requests(0, world.rank)]
    randomness = MicroBatchRandomness(world.device, compiled=model if is_compiled(model) else None)
    # Sums of the metrics, then the number of targets.
    totals = torch.zeros(len(part.metrics) + 1, dtype=torch.float64, device=world.device)
    for i in range(order.most_batches):
        agree = _ask_to_stop(world, request, f"{name}.stop") if i % _batches_between(world) == 0 else _nobody_asks
        world.progress.enter("evaluation")
        for indices in batches[i : i + 1]:  # a rank may have one batch less than others
            totals += _totals(job, model, part, loader, randomness, (i, indices))
        if agree():
            return None
    *sums_of_all, num_targets = world.all_reduce(totals, "sum", name).tolist()
    if not num_targets:
        job.log.say(f"WARNING: {part.name or 'the held-out data'} has no targets: there is nothing to take a mean of")
    means = [total / num_targets if num_targets else torch.nan for total in sums_of_all]
    return dict(zip(metric_names(part), means, strict=True))


def _batches_between(world: World) -> int:
    """Return after how many batches ranks agree on a stop: a batch takes a GPU less time than they need to agree."""
    return 1 if world.reads_at_once else 16


def _ask_to_stop(world: World, request: StopRequest | None, name: str) -> Callable[[], bool]:
    """Ask all ranks whether one has a request to stop; the answer is waited for later. Collective."""
    has_request = torch.tensor(float(request is not None and request.reason is not None))
    wait = world.start_all_reduce(has_request, "max", name)
    return lambda: bool(wait())


def _nobody_asks() -> bool:
    return False


def _totals(
    job: Job,
    model: nn.Module,
    part: Evaluation,
    loader: Loader,
    randomness: MicroBatchRandomness,
    wanted: tuple[int, Tensor],
) -> Tensor:
    """Return a batch's sums of `part.metrics` and its number of targets, float64 `(len(metrics) + 1,)`.

    What is drawn at random belongs to samples, as in training, and is the same in every evaluation.
    """
    number, indices = wanted
    device, precision = job.world.device, job.config.train.precision
    batch = loader.read(0, number)

    def forward() -> dict[str, Tensor]:
        with autocast(precision, device):
            values = part.loss_sums(model, to_device(batch, device, precision))
        return as_sums(values, part.reduction, part.data, indices)

    sums = randomness.run(indices, (job.config.train.seed, "evaluation"), forward, lambda sums: None)
    totals = [as_sum(sums[key], key, device) for key in part.metrics]
    return torch.stack([*totals, torch.full_like(totals[0], count_targets(part.data, indices))])
