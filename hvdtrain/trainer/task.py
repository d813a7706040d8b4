"""What is trained (`Task`), and one run of it with everything settled (`Job`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from hvdtrain.checkpoint import Manifest
from hvdtrain.config import BatchPlan, Config, keep_batch, plan_batch
from hvdtrain.data.dataset import Dataset
from hvdtrain.data.order import SampleOrder
from hvdtrain.dist import World
from hvdtrain.errors import ConfigError
from hvdtrain.metrics import MetricLog
from hvdtrain.schedule import check_schedule, lr_factor

if TYPE_CHECKING:
    from typing_extensions import Self

Batch = tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Something to be evaluated beside the held-out data."""

    data: Dataset
    loss: Callable[[nn.Module, Batch], dict[str, Tensor]]
    """Returns, for one batch on the model's device, a *sum* over its targets for each name in `metrics`."""
    metrics: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is trained: a model, its data and its loss."""

    model: nn.Module
    """On the CPU, built from the seed."""
    train_data: Dataset
    val_data: Dataset
    loss: Callable[[nn.Module, Batch], dict[str, Tensor]]
    """Returns, for one batch on the model's device, a *sum* over its targets for each name in `metrics`."""
    metrics: tuple[str, ...] = ("loss",)
    """Names of the sums that `loss` returns; "loss" is the one that is minimised."""
    evaluations: tuple[Evaluation, ...] = ()
    """What is evaluated besides `val_data`."""
    unit: str = "samples"
    """What a target is, in the plural: "samples" or "tokens"."""
    summarize: Callable[[dict[str, float]], dict[str, float]] = lambda means: means
    """Derives further figures from the evaluated means, such as bits per byte."""
    epilogue: Callable[[nn.Module, dict[str, float]], str] = lambda model, metrics: ""
    """Called on rank 0 after the last evaluation: what a person should read at the end. No collectives."""
    write_model_files: Callable[[Path], None] = lambda folder: None
    """Writes to RUN_DIR/model what a reader of the weights needs: config.json and the tokenizer, as transformers does.
    Called on rank 0 when training begins."""
    description: str = ""
    """What a person should read at the start about model and data."""
    fingerprint: str = ""
    """Changes when the data does; a run goes on only with the data it began with."""


@dataclass(frozen=True, kw_only=True)
class Recipe(Config):
    """Settings that know how to build their task. Derive from it, frozen and keyword-only, and add sections."""

    def build(self, say: Callable[[str], None]) -> Task:
        """Return the task, alike on every rank and without collectives; `say` tells a person what takes long.

        Raises:
            UsageError: data is missing, or settings do not fit it.
        """
        raise NotImplementedError(f"{type(self).__name__} has no method build(say) that returns a Task")

    def resolve(self) -> Self:
        """Return the settings with those filled in that others decide, such as the shape of a model that is loaded.

        Raises:
            UsageError: what they name cannot be read.
        """
        return self


@dataclass(frozen=True)
class Job:
    """A task with its settings, its ranks and its run directory; everything that does not change while training."""

    task: Task
    config: Config
    world: World
    run_dir: Path
    log: MetricLog
    plan: BatchPlan
    order: SampleOrder
    num_steps: int
    """Optimizer steps of the whole run."""
    allowed_changes: tuple[str, ...] = ()
    """Settings that may differ from those of the checkpoint that the run goes on from."""

    @property
    def lr_factor(self) -> float:
        """Return by what `--optim.lr-rule` multiplies the learning rate."""
        return lr_factor(self.config.optim, self.plan.global_batch_size)


def settle(
    task: Task,
    config: Config,
    world: World,
    run_dir: Path,
    log: MetricLog,
    allowed_changes: tuple[str, ...] = (),
    before: Manifest | None = None,
) -> Job:
    """Return the job, its batch arithmetic and number of steps settled.

    Args:
        task: what is trained.
        config: its settings.
        world: the ranks.
        run_dir: the directory of the run.
        log: where metrics go.
        allowed_changes: settings that may differ from those of the checkpoint that the run goes on from.
        before: that checkpoint; on another number of ranks the run keeps its global batch.

    Raises:
        ConfigError: the settings do not fit together, the number of ranks or the data.
    """
    plan = _plan(config, world.size, before)
    order = SampleOrder(len(task.train_data), plan, config.train.seed)
    num_steps = config.train.steps
    if num_steps is None:
        if config.train.epochs is None:
            raise ConfigError("give --train.steps or --train.epochs")
        num_steps = max(1, round(config.train.epochs * order.steps_per_epoch))
    check_schedule(config.optim, num_steps)
    return Job(task, config, world, run_dir, log, plan, order, num_steps, allowed_changes)


def _plan(config: Config, world_size: int, before: Manifest | None) -> BatchPlan:
    if before is None or before.world_size == world_size or not (before.global_batch_size and before.micro_batch_size):
        return plan_batch(config.train, world_size)
    if config.train.global_batch_size not in (None, before.global_batch_size):
        return plan_batch(config.train, world_size)  # resuming will say that it must not change
    return keep_batch(config.train, world_size, before.global_batch_size, before.micro_batch_size)
