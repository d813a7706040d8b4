"""`Callback`: code of a user's own that runs after steps and evaluations of `Task(callbacks=[...])`."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hvdtrain.data.nested import map_tensors
from hvdtrain.errors import ConfigError
from hvdtrain.process.arguments import misfit
from hvdtrain.trainer.component import Component, Step
from hvdtrain.trainer.job import Job
from hvdtrain.trainer.values import as_figure, storable
from hvdtrain.world import World, WrappedOptimizer

if TYPE_CHECKING:
    from hvdtrain.trainer.state import Training


class RunView:
    """What a callback sees of the run, and what it can ask of it."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self.world: World = job.world
        """The ranks; collectives are allowed, since every rank calls every callback."""
        self.num_steps: int = job.num_steps
        """Optimizer steps of the whole run."""
        self.model: nn.Module
        """With the weights after the step; parameters still hold its averaged gradients, after clipping. With
        --optim.shard they do not: each rank's part of them is in the optimizer's parameter groups."""
        self.optimizer: WrappedOptimizer
        """The wrapped optimizer."""
        self.step: int = 0
        """Optimizer steps completed."""
        self.is_rehearsal: bool = job.directory is None
        """Whether this is no run but some steps of `verify`, `bench` or `plan`, after which the weights are dropped."""
        self.figures: dict[str, float] = {}
        self.reason: str = ""

    @property
    def epoch(self) -> float:
        """Return the passes over the training data so far."""
        return self.step / self._job.order.steps_per_epoch

    def log(self, **figures: Any) -> None:
        """Have numbers written with the next line of metrics, as `callback/NAME`; those of rank 0 count.

        Raises:
            ConfigError: one is no number.
        """
        for name, value in figures.items():
            self.figures[f"callback/{name}"] = as_figure(value, name)

    def stop(self, reason: str = "") -> None:
        """End the run after this step, as if it were its last: it is evaluated and saved, and the exit code is 0.

        One rank that asks for it is enough.
        """
        self.reason = str(reason) or "a callback has asked for it"


class Callback:
    """Code that runs after steps and evaluations; leave out what you do not need.

    Every rank calls every method, in the same order. A class with such methods need not be derived from this one.

    Example: stop at a loss that is good enough, however the run is interrupted in between.

        class GoodEnough(hvdtrain.Callback):
            def after_evaluation(self, run, metrics):
                if metrics["val/loss"] < 0.1:
                    run.stop("the loss is below 0.1")
    """

    def begin(self, run: RunView) -> None:
        """Get ready, once, before the first step of this start; `load_state_dict` comes after it."""

    def after_step(self, run: RunView) -> None:
        """Act after an optimizer step; steps that were skipped since they were not finite count too."""

    def after_evaluation(self, run: RunView, metrics: Mapping[str, float]) -> None:
        """Act on the metrics of an evaluation, `val/loss` and so on, which are the same on all ranks."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a run that goes on needs, alike on all ranks: tensors and plain values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` returned."""


# How other trainers' methods begin, which a user may believe to be called.
_LIKE_HOOKS = ("on_", "after_", "before_")
# Method -> how many arguments it is given.
_METHODS = {"begin": 1, "after_step": 1, "after_evaluation": 2, "state_dict": 0, "load_state_dict": 1}


def callback_components(job: Job) -> list[Component]:
    """Return a component for each callback of the task, named by its class, and numbered where there are several.

    Raises:
        ConfigError: an object has none of the methods, or a class stands where an object belongs.
    """
    seen: Counter[str] = Counter()
    components: list[Component] = []
    for callback in job.task.callbacks:
        if isinstance(callback, type):
            raise ConfigError(
                f"Task.callbacks holds the class {callback.__name__}: make an object, {callback.__name__}()"
            )
        if isinstance(callback, torch.optim.lr_scheduler.LRScheduler):
            raise ConfigError(
                f"Task.callbacks holds torch's {type(callback).__name__}, which would change nothing: the learning rate"
                " is set before every step, as --optim.schedule says"
            )
        if not any(callable(getattr(callback, method, None)) for method in _METHODS):
            raise ConfigError(
                f"Task.callbacks holds {type(callback).__name__}, which has none of {', '.join(_METHODS)}"
            )
        kind = type(callback).__name__
        for method, count in _METHODS.items():
            written = misfit(getattr(callback, method), count) if hasattr(callback, method) else ""
            if written:
                example = getattr(Callback, method)
                raise ConfigError(
                    f"the callback {kind} has a method {written}, which is called with {count} argument"
                    f"{'s' * (count != 1)}: write def {method}({', '.join(inspect.signature(example).parameters)})"
                )
        others = _never_called(callback)
        if others:
            job.log.say(
                f"callbacks:  nothing calls {', '.join(others)} of {kind}: the methods that are called are"
                f" {', '.join(_METHODS)}"
            )
        seen[kind] += 1
        components.append(CallbackComponent(job, callback, f"callback.{kind}.{seen[kind]}"))
    return components


def _never_called(callback: Any) -> list[str]:
    """Return the methods that are named as other trainers' are, which the user may believe to be called."""
    names = (name for kind in type(callback).__mro__ for name in vars(kind) if name not in _METHODS)
    return sorted({name for name in names if name.startswith(_LIKE_HOOKS) and callable(getattr(callback, name))})


class CallbackComponent(Component):
    """A callback as a component of the job."""

    def __init__(self, job: Job, callback: Any, name: str) -> None:
        self.name = name
        self._callback, self._run, self._log = callback, RunView(job), job.log
        self._is_checked = self._has_warned = False
        self.ends_after_steps = hasattr(callback, "after_step")

    def _call(self, method: str, *arguments: Any) -> Any:
        own = getattr(self._callback, method, None)
        return own(*arguments) if own is not None else None

    def attach(self, training: Training) -> None:
        """Show the callback the run."""
        self._run.model, self._run.optimizer, self._run.step = training.model, training.optimizer, training.step

    def begin(self, model: nn.Module) -> None:
        """Run the callback's `begin`."""
        self._call("begin", self._run)

    def after_update(self, training: Training, step: Step) -> None:
        """Run the callback's `after_step`."""
        self._run.step = step.number
        self._call("after_step", self._run)
        if not self._is_checked:  # what no checkpoint can hold is found now, and not when the first one is due
            self._is_checked = True
            storable(self.state_dict(), f"state_dict() of the callback {type(self._callback).__name__}")

    def before_looking(self, training: Training) -> None:
        """Say once where ranks' callbacks hold different values: rank 0's are saved. Tensors are compared otherwise."""
        world, own = self._run.world, getattr(self._callback, "state_dict", None)
        if own is None or world.size == 1 or self._has_warned:
            return
        if not world.agrees(map_tensors(lambda tensor: None, self.state_dict()), f"{self.name}.state"):
            self._has_warned = True
            self._log.say(
                f"WARNING: state_dict() of the callback {type(self._callback).__name__} is not the same on all ranks: a"
                " checkpoint holds rank 0's, with which all go on. Make it alike, as by run.world.all_reduce(...)"
            )

    def after_evaluation(self, training: Training, metrics: Mapping[str, float]) -> None:
        """Run the callback's `after_evaluation`."""
        self._run.step = training.step
        self._call("after_evaluation", self._run, dict(metrics))

    def metrics(self, training: Training) -> dict[str, float]:
        """Return what rank 0's callback has logged since the last line. Collective."""
        figures, self._run.figures = self._run.figures, {}
        return self._run.world.broadcast_object(figures, f"{self.name}.figures")

    def reason_to_end(self) -> str:
        """Return why this rank's callback asks for the end."""
        return self._run.reason

    def end(self, reason: str) -> None:
        """Keep the reason for the checkpoint, also where another rank had it."""
        self._run.reason = reason

    def state_dict(self) -> dict[str, Any]:
        """Return the callback's state, and whether it has ended the run."""
        own = self._call("state_dict") or {}
        return {"callback": own, "reason": self._run.reason} if own or self._run.reason else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` returned."""
        self._run.reason = state["reason"]
        if state["callback"]:
            self._call("load_state_dict", state["callback"])
