"""A job without a run: steps that leave no trace, for whoever measures or checks training."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass

from torch import Tensor

from hvdtrain.data.order import SampleOrder
from hvdtrain.rundir.log import MetricLog
from hvdtrain.settings import BatchPlan, Config, plan_batch
from hvdtrain.trainer.job import Job, order_of
from hvdtrain.trainer.local_updates import strategy_of
from hvdtrain.trainer.task import Task
from hvdtrain.trainer.wire import check_compression
from hvdtrain.world import World

_ENDLESS = 1_000_000


@dataclass(frozen=True)
class FullBatches(SampleOrder):
    """The full batches of the first epoch, over and over: every step takes equally long."""

    def _full(self, step: int) -> int:
        return step % (self.num_samples // self.plan.global_batch_size)

    def global_batch(self, step: int) -> Tensor:
        """Return the samples, int64 `(n,)`, of the step that follows `step` completed ones."""
        return super().global_batch(self._full(step))

    def micro_batches(self, step: int, rank: int, in_step: bool = False) -> list[Tensor]:
        """Return the positions in `global_batch(step)`, int64 `(n,)`, of each of a rank's micro-batches."""
        return super().micro_batches(self._full(step), rank, in_step)


def rehearse(
    task: Task,
    config: Config,
    world: World,
    *,
    plan: BatchPlan | None = None,
    order: SampleOrder | None = None,
    num_steps: int = _ENDLESS,
    only_full_batches: bool = False,
) -> Job:
    """Return a job of this task that has no directory and writes nothing, with its own copy of the weights.

    `start_training` begins it; nothing is ever read from, or saved to, a run.

    Args:
        task: what is trained; its model is not touched.
        config: its settings; how long a run takes is not read.
        world: the ranks.
        plan: the batch arithmetic; None: as the settings have it.
        order: which samples each step sees; None: as in training.
        num_steps: what the learning rate's schedule takes for the length of the run.
        only_full_batches: leave out the short batch at the end of each epoch; for measurements.

    Raises:
        ConfigError: the settings do not fit together, the number of ranks or the data.
    """
    plan = plan or plan_batch(config.train, world.size)
    order = order or order_of(task, plan, config.train.seed)
    if only_full_batches:
        order = FullBatches(order.num_samples, order.plan, order.seed, order.sampler, order.drop_last)
    task = dataclasses.replace(task, model=copy.deepcopy(task.model))
    check_compression(config)
    strategy = strategy_of(config, world.size)
    return Job(task, config, world, None, MetricLog(None, []), plan, order, num_steps, strategy=strategy)
