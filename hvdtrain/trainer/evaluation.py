"""Evaluation on held-out data: means over all targets, and figures of all answers, each counted once on any ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hvdtrain.data.loader import Loader
from hvdtrain.data.order import EvaluationOrder
from hvdtrain.errors import ConfigError
from hvdtrain.models.compilation import is_compiled
from hvdtrain.process.stop import StopRequest
from hvdtrain.trainer.job import Job, metric_names
from hvdtrain.trainer.modes import in_eval_mode
from hvdtrain.trainer.randomness import MicroBatchRandomness
from hvdtrain.trainer.state import Training
from hvdtrain.trainer.step import autocast, to_device
from hvdtrain.trainer.task import CorpusEvaluation, Evaluation
from hvdtrain.trainer.values import as_figure, as_sum, as_sums, count_targets
from hvdtrain.world import World


def evaluate(job: Job, training: Training, request: StopRequest | None = None) -> dict[str, float]:
    """Return `val/...` of the weights that are evaluated: the model's own, or their moving average. Collective.

    Returns nothing if a rank has a request to stop before the end. Means over no targets are not a number.
    """
    task = job.task
    held_out = Evaluation(data=task.val_data, loss_sums=task.loss_sums, metrics=task.metrics, reduction=task.reduction)
    means: dict[str, float] = {}
    training.before_change()
    weights = training.strategy.made_equal(job.world, training), training.with_evaluated_weights()
    for component in training.components:
        component.before_evaluation(training)
    with weights[0], weights[1], in_eval_mode(training.model), torch.no_grad():
        for number, part in enumerate((held_out, *task.evaluations)):
            name = f"evaluate.{number}"
            key = (name, _order(job, part))
            if key not in training.held_out:
                training.held_out[key] = _loader(job, part)
            given = (training.held_out[key], request, name)
            if isinstance(part, CorpusEvaluation):
                found = _scores(job, training.model, part, *given)
            else:
                found = _means(job, training, part, *given)
            if found is None:
                return {}
            means.update(found)
        values = {f"val/{name}": as_figure(value, name) for name, value in task.summarize(means).items()}
        job.log.show(training.step, lambda: task.samples(task.model, values))
    return values


def _order(job: Job, part: Evaluation | CorpusEvaluation) -> EvaluationOrder:
    batch_size = job.config.eval.batch_size or job.plan.micro_batch_size
    return EvaluationOrder(len(part.data), batch_size, job.world.size, job.config.train.seed)


def _loader(job: Job, part: Evaluation | CorpusEvaluation) -> Loader:
    world = job.world
    return Loader(part.data, _order(job, part), world.rank, pin_memory=world.device.type == "cuda", reading=job.reading)


def _each_batch(
    job: Job,
    part: Evaluation | CorpusEvaluation,
    request: StopRequest | None,
    name: str,
    use: Callable[[int, Tensor], None],
) -> bool:
    """Call `use` with the number and the indices of each of this rank's batches. Collective.

    Returns:
        False if a rank has a request to stop before the end.
    """
    world, order = job.world, _order(job, part)
    batches = [request.samples for request in order.requests(0, world.rank)]
    for i in range(order.most_batches):
        agree = _ask_to_stop(world, request, f"{name}.stop") if i % _batches_between(world) == 0 else _nobody_asks
        world.progress.enter("evaluation")
        for indices in batches[i : i + 1]:  # a rank may have one batch less than others
            use(i, indices)
        if agree():
            return False
    return True


def _means(
    job: Job, training: Training, part: Evaluation, loader: Loader, request: StopRequest | None, name: str
) -> dict[str, float] | None:
    """Return means over all targets; None if a rank has a request to stop before the end. Collective."""
    world, model, own = job.world, training.model, training.randomness.generators.own
    randomness = MicroBatchRandomness(world.device, is_compiled=is_compiled(model), own=own)
    # Sums of the metrics, then the number of targets.
    totals = torch.zeros(len(part.metrics) + 1, dtype=torch.float64, device=world.device)

    def add(number: int, indices: Tensor) -> None:
        totals.add_(_totals(job, model, part, loader, randomness, (number, indices)))

    if not _each_batch(job, part, request, name, add):
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


def _scores(
    job: Job, model: nn.Module, part: CorpusEvaluation, loader: Loader, request: StopRequest | None, name: str
) -> dict[str, float] | None:
    """Return figures of the answers of all ranks; None if a rank has a request to stop before the end. Collective."""
    world, precision = job.world, job.config.train.precision
    own: list[Any] = []

    def answer(number: int, indices: Tensor) -> None:
        batch = to_device(loader.read(0, number), world.device, precision)
        with autocast(precision, world.device):
            answers = list(part.answers(model, batch))
        if len(answers) != len(indices):
            raise ConfigError(
                f"CorpusEvaluation(answers=...) returned {len(answers)} answers to {len(indices)} samples: one each"
            )
        own.extend(answers)

    if not _each_batch(job, part, request, name, answer):
        return None
    # Shares of ranks are contiguous: one after the other they are in the order of the data.
    everyone = [answer for answers in world.all_gather_object(own, f"{name}.answers") for answer in answers]
    found = world.together(lambda: _scored(part, everyone) if world.rank == 0 else {}, f"{name}.score")
    return world.broadcast_object(found, f"{name}.figures")


def _scored(part: CorpusEvaluation, answers: list[Any]) -> dict[str, float]:
    figures = part.score(answers)
    if figures.keys() != set(part.metrics):
        raise ConfigError(
            f"CorpusEvaluation(score=...) returned the figures {', '.join(figures) or 'none'}, and metrics= names"
            f" {', '.join(part.metrics)}: both must name the same"
        )
    return {name: float(figures[own]) for name, own in zip(metric_names(part), part.metrics, strict=True)}


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
