"""Short trainings of one task, each from the same weights: what the checks compare."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hvdtrain.data.dataset import Dataset
from hvdtrain.data.draws import Draws, Request
from hvdtrain.data.order import SampleOrder
from hvdtrain.data.readers import BatchSource
from hvdtrain.process.launch import Launch
from hvdtrain.settings import BatchPlan, Precision
from hvdtrain.trainer import Job, Recipe, Task
from hvdtrain.trainer.job import order_of
from hvdtrain.trainer.rehearsal import rehearse
from hvdtrain.trainer.state import Training, start_training
from hvdtrain.trainer.step import train_step
from hvdtrain.world import SoloWorld, World


class FewSamples:
    """The first samples of a data set, and a record of which were read."""

    def __init__(self, dataset: Dataset, num_samples: int) -> None:
        self._dataset, self._source = dataset, BatchSource(dataset)
        self._num_samples = num_samples
        self.read: list[int] = []

    def __len__(self) -> int:
        return self._num_samples

    def batch(self, indices: Tensor, draws: Draws) -> Any:
        """Read, and remember what."""
        self.read += indices.tolist()
        return self._source.read(Request(indices, draws))

    def num_targets(self, indices: Tensor) -> int:
        """Return the data set's own count."""
        return self._dataset.num_targets(indices)


@dataclass(frozen=True)
class JointOrder(SampleOrder):
    """One rank that takes the micro-batches of many: of all ranks at once, or one rank's after another's."""

    as_size: int = 1
    apart: bool = False

    def micro_batches(self, step: int, rank: int, in_step: bool = False) -> list[Tensor]:
        """Return positions in the global batch of each micro-batch."""
        plan = dataclasses.replace(self.plan, world_size=self.as_size)
        order = SampleOrder(self.num_samples, plan, self.seed, drop_last=self.drop_last)
        ranks = [order.micro_batches(step, rank, in_step=True) for rank in range(self.as_size)]
        if self.apart:
            return [positions for batches in ranks for positions in batches if len(positions)]
        return [torch.cat(together) for together in zip(*ranks, strict=True)]


@dataclass(frozen=True)
class Trial:
    """What all short trainings share.

    The data is cut down to two and a half global batches, so that a few steps cross the end of an epoch, whose last
    batch is short: ranks then hold different numbers of samples.
    """

    recipe: Recipe
    task: Task
    world: World
    plan: BatchPlan
    folder: Path
    steps: int

    def solo(self) -> SoloWorld:
        """Return a world of this process alone, on the same device."""
        return SoloWorld(self.world.device, Launch("none"))

    def job(self, world: World, order: SampleOrder | None = None, precision: Precision | None = None) -> Job:
        """Return a job with a copy of the weights, whose steps are `steps` long and leave no trace."""
        few = min(len(self.task.train_data), 2 * self.plan.global_batch_size + short_batch(self.plan))
        task = dataclasses.replace(self.task, train_data=FewSamples(self.task.train_data, few))
        train = dataclasses.replace(self.recipe.train, precision=precision or self.recipe.train.precision)
        config = dataclasses.replace(self.recipe, train=train)
        order = order or order_of(self.task, self.plan, train.seed)
        order = dataclasses.replace(order, num_samples=few)
        return rehearse(task, config, world, plan=self.plan, order=order, num_steps=10 * self.steps)

    def together(self, precision: Precision | None = None) -> Run:
        """Train on all ranks. Collective."""
        return Run.of(self.job(self.world, precision=precision), self.steps)

    def alone(self, precision: Precision | None = None, *, apart: bool = False, accum_steps: int | None = None) -> Run:
        """Train on one rank, on the same global batches; every rank does so for itself.

        Args:
            precision: None for the recipe's own.
            apart: a micro-batch holds one rank's samples, not those of all ranks together.
            accum_steps: cut a batch into so many micro-batches instead.
        """
        plan, size = self.plan, self.world.size
        if accum_steps is not None:
            micro = -(-plan.global_batch_size // accum_steps)
            plan, size = dataclasses.replace(plan, micro_batch_size=micro, accum_steps=accum_steps), 1
        seed = self.recipe.train.seed
        own = order_of(self.task, plan, seed)
        order = JointOrder(own.num_samples, plan, seed, own.sampler, drop_last=own.drop_last, as_size=size, apart=apart)
        accum = plan.accum_steps * (size if apart else 1)
        job = self.job(self.solo(), order, precision)
        whole = dataclasses.replace(plan, world_size=1, accum_steps=accum)
        return Run.of(dataclasses.replace(job, plan=whole), self.steps)


def smallest_divisor(number: int) -> int:
    """Return the smallest divisor of a number but 1; 1 has none but itself."""
    return next((n for n in range(2, number + 1) if number % n == 0), 1)


def short_batch(plan: BatchPlan) -> int:
    """Return the size of a short batch that ranks share unevenly, if it can be had without micro-batches of one sample.

    Batch normalisation, for one, has no use for those.
    """

    def is_good(n: int) -> bool:
        shares = {n * (rank + 1) // plan.world_size - n * rank // plan.world_size for rank in range(plan.world_size)}
        is_uneven = plan.world_size == 1 or len(shares) > 1
        leaves_one = any(share % plan.micro_batch_size == 1 for share in shares) and plan.micro_batch_size > 1
        part = total // smallest_divisor(total)
        return is_uneven and not leaves_one and (part == 1 or n % part != 1)

    total = plan.global_batch_size
    start = total // 2 + 1
    return next((n for n in [*range(start, total), *range(1, start)] if is_good(n)), min(start, total))


@dataclass
class Run:
    """A training that has been run."""

    job: Job
    training: Training
    start: dict[str, Tensor]
    """Weights before the first step, by name."""

    @staticmethod
    def of(job: Job, steps: int) -> Run:
        """Take `steps` steps. Collective where the job's world has other ranks."""
        training = start_training(job)
        run = Run(job, training, {name: value.detach().clone() for name, value in run_tensors(training).items()})
        for _ in range(steps):
            train_step(job, training)
        return run

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Return weights and buffers by name."""
        return run_tensors(self.training)

    @property
    def weights(self) -> dict[str, Tensor]:
        """Return the weights by name."""
        return {name: parameter.detach() for name, parameter in self.training.model.named_parameters()}

    @property
    def read(self) -> list[int]:
        """Return the samples that this rank has read."""
        data = self.job.task.train_data
        assert isinstance(data, FewSamples)
        return data.read


def run_tensors(training: Training) -> dict[str, Tensor]:
    """Return parameters and buffers that hold real numbers."""
    model = training.model
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor.detach() for name, tensor in named.items() if tensor.is_floating_point()}
