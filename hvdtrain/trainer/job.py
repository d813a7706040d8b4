"""One run of a task, with everything settled that does not change while it trains."""

from __future__ import annotations

from dataclasses import dataclass, field

from hvdtrain.data.loader import Reading
from hvdtrain.data.order import SampleOrder
from hvdtrain.data.samplers import InOrder, Shuffled, check_sampler
from hvdtrain.data.stream import ENDLESS
from hvdtrain.errors import ConfigError, DataError
from hvdtrain.optim.schedule import check_schedule, lr_factor
from hvdtrain.rundir.directory import RunDirectory
from hvdtrain.rundir.log import MetricLog
from hvdtrain.rundir.manifest import Manifest
from hvdtrain.settings import BatchPlan, Config, keep_batch, plan_batch
from hvdtrain.settings.intervals import parse_every
from hvdtrain.trainer.contract import check_task
from hvdtrain.trainer.local_updates import strategy_of
from hvdtrain.trainer.strategy import EveryStep, Strategy
from hvdtrain.trainer.task import CorpusEvaluation, Evaluation, Task
from hvdtrain.trainer.wire import check_compression
from hvdtrain.world import World

# What components write as train/NAME.
_OF_EVERY_LINE = ("lr", "grad_norm", "epoch", "skipped_steps", "spikes", "noise_scale", "loss_scale", "plateau_factor")


@dataclass(frozen=True)
class Job:
    """A task with its settings, its ranks and its run directory; everything that does not change while training."""

    task: Task
    config: Config
    world: World
    directory: RunDirectory | None
    """None: a rehearsal, which leaves no trace."""
    log: MetricLog
    plan: BatchPlan
    order: SampleOrder
    num_steps: int
    """Optimizer steps of the whole run."""
    allowed_changes: tuple[str, ...] = ()
    """Settings that may differ from those of the checkpoint that the run goes on from."""
    strategy: Strategy = field(default_factory=EveryStep)
    """What ranks share, and when they are equal."""
    flops_per_target: float | None = None
    """Operations of a term of the loss, forward and backward; 0: nobody can tell. None: they were not counted."""

    def __post_init__(self) -> None:
        if self.config.train.precision == "auto":
            raise ValueError("settle_precision comes before a job is made")

    @property
    def run(self) -> RunDirectory:
        """Return the run's directory.

        Raises:
            ValueError: it is a rehearsal.
        """
        if self.directory is None:
            raise ValueError("a rehearsal has no directory")
        return self.directory

    @property
    def reading(self) -> Reading:
        """Return by whom batches are read; a worker that hangs is named before the whole rank is taken to hang."""
        data = self.config.data
        # A recipe's own section of this name may know nothing of them.
        workers, ahead = getattr(data, "workers", 0), getattr(data, "ahead", None)
        return Reading(workers, ahead, self.config.health.stall_limit_s / 2)

    @property
    def is_offloaded(self) -> bool:
        """Return whether the optimizer's state lies in host memory, where the model does not."""
        return self.config.optim.offload == "cpu" and self.world.device.type != "cpu"

    @property
    def lr_factor(self) -> float:
        """Return by what `--optim.lr-rule` multiplies the learning rate."""
        return lr_factor(self.config.optim, self.plan.global_batch_size)


def settle(
    task: Task,
    config: Config,
    world: World,
    run: RunDirectory,
    log: MetricLog,
    allowed_changes: tuple[str, ...] = (),
    before: Manifest | None = None,
) -> Job:
    """Return the job, its batch arithmetic and number of steps settled.

    Args:
        task: what is trained.
        config: its settings.
        world: the ranks.
        run: the directory of the run.
        log: where metrics go.
        allowed_changes: settings that may differ from those of the checkpoint that the run goes on from.
        before: that checkpoint; on any number of ranks the run keeps its global batch.

    Raises:
        ConfigError: the settings do not fit together, the number of ranks or the data.
        DataError: there is no data.
    """
    check_task(task)
    check_names(task)
    plan = _plan(config, world.size, before)
    order = order_of(task, plan, config.train.seed)
    check_sampler(order.sampler, order.num_samples)
    num_steps = config.train.steps
    if num_steps is None:
        if config.train.epochs is None:
            raise ConfigError("give --train.steps or --train.epochs")
        if order.num_samples >= ENDLESS:
            raise ConfigError("give --train.steps: the stream does not say how many samples an epoch has")
        num_steps = max(1, round(config.train.epochs * order.steps_per_epoch))
    check_schedule(config.optim, num_steps)
    if order.num_samples >= ENDLESS:
        _check_no_epochs(config)
    check_compression(config)
    strategy = strategy_of(config, world.size)
    return Job(task, config, world, run, log, plan, order, num_steps, allowed_changes, strategy)


def _check_no_epochs(config: Config) -> None:
    for name, every in (
        ("log", config.log.every),
        ("eval", config.eval.every),
        ("checkpoint", config.checkpoint.every),
    ):
        if every is not None and parse_every(name, every, seconds=True).unit == "epochs":
            raise ConfigError(
                f"--{name}.every {every}: the stream does not say how many samples an epoch has; give a number of steps"
            )


def order_of(task: Task, plan: BatchPlan, seed: int) -> SampleOrder:
    """Return which samples each step sees.

    Raises:
        DataError: a stream was given an order.
        ConfigError: there are fewer samples than a global batch takes.
    """
    is_stream = getattr(task.train_data, "is_sequential", False)
    sampler = task.sampler or (InOrder() if is_stream else Shuffled())
    if is_stream and not isinstance(sampler, InOrder):
        raise DataError("a stream has its own order: leave Task(sampler=...) out")
    return SampleOrder(len(task.train_data), plan, seed, sampler, task.drop_last)


def _plan(config: Config, world_size: int, before: Manifest | None) -> BatchPlan:
    if before is None or not (before.global_batch_size and before.micro_batch_size):
        return plan_batch(config.train, world_size)
    if config.train.global_batch_size not in (None, before.global_batch_size):
        return plan_batch(config.train, world_size)  # resuming will say that it must not change
    return keep_batch(config.train, world_size, before.global_batch_size, before.micro_batch_size)


def check_names(task: Task) -> None:
    """Make sure that no two evaluations report a metric of the same name, nor training one that each line has anyway.

    Raises:
        ConfigError: they do.
    """
    taken = [name for name in task.metrics if name in _OF_EVERY_LINE]
    if taken:
        raise ConfigError(
            f"Task(metrics=...) names '{taken[0]}', and train/{taken[0]} is a figure that lines of metrics have anyway:"
            " give it another name"
        )
    seen = set(task.metrics)
    for part in task.evaluations:
        for name in metric_names(part):
            if name in seen:
                raise ConfigError(
                    f"two evaluations report val/{name}: give them names, Evaluation(name=...), and they report"
                    f" val/<name>/{name}"
                )
            seen.add(name)


def metric_names(part: Evaluation | CorpusEvaluation) -> list[str]:
    """Return the names of an evaluation's metrics, with its own before them."""
    return [f"{part.name}/{metric}" if part.name else metric for metric in part.metrics]
