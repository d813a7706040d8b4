"""`Component`: a part with state that takes part in every step. `components.py` has the table of them.

A new one is one file, one line in that table and, where a person can choose it, one setting.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hvdtrain.trainer.outcome import Outcome

if TYPE_CHECKING:
    from hvdtrain.trainer.job import Job
    from hvdtrain.trainer.state import Training

Totals = list[float] | Tensor
"""A sum for each of `Task.metrics`: plain numbers, or float64 `(len(metrics),)` on a GPU, which nobody waits for."""

# What a step's figures are before they are known; nobody writes into them.
_UNKNOWN, _TRUE = torch.tensor(torch.nan), torch.tensor(True)


@dataclass
class Step:
    """One optimizer step while it is taken: what components see of it."""

    number: int
    """Optimizer steps completed when it ends; the first step is number 1."""
    totals: Totals
    """As `sums`; plain numbers where the model is in host memory."""
    num_targets: int
    """Terms that the loss of the global batch sums over."""
    num_samples: int
    """Samples of the global batch; fewer than usual at the end of an epoch."""
    loss_scale: Tensor | float = 1.0
    """What the loss was multiplied by before it was differentiated."""
    grad_norm: Tensor = _UNKNOWN
    """Euclidean norm of the averaged gradient before clipping, a scalar on the device; known after the update."""
    is_finite: Tensor = _TRUE
    """Whether the step counts, bool, a scalar on the device, alike on all ranks; known after the update. Where it is
    False the weights were left as they were: the gradient is not finite, or longer than `norm_limit`."""
    norm_limit: float = math.inf
    """Gradients that are longer are left out; a component may set it in `after_backward`, alike on all ranks."""
    outcome: Outcome | None = None
    """The last two on their way to the host; there after the update."""

    @property
    def sums(self) -> Tensor:
        """Return this rank's sums of `Task.metrics`, float64 `(len(metrics),)`."""
        return self.totals if isinstance(self.totals, Tensor) else torch.tensor(self.totals, dtype=torch.float64)


class Component:
    """A part of training with state of its own; every method may be left as it is here.

    Methods are called on every rank in the same order, so all of them may make collectives. Between ranks, the state is
    either replicated (computed alike everywhere, saved once, compared by the checks that ranks are equal) or per rank
    (gathered for the save, and given back to the same rank when the run goes on).

    Example: a component that logs how far the weights are from where they began.

        class Distance(Component):
            name = "distance"

            def begin(self, model):
                self.start = [p.detach().clone() for p in model.parameters()]

            def metrics(self, training):
                gaps = [(p - s).norm() for p, s in zip(training.model.parameters(), self.start)]
                return {"train/distance": float(torch.stack(gaps).norm())}

            def state_dict(self):
                return {"start": self.start}

            def load_state_dict(self, state):
                for own, saved in zip(self.start, state["start"]):
                    own.copy_(saved)
    """

    name: str
    """Key of its state in a checkpoint: unique, and the same in later versions."""
    is_replicated: bool = True
    """Whether the state is the same on every rank."""
    wrap_options: Mapping[str, Any] = {}
    """Arguments that it needs of `World.wrap`."""
    about: str = ""
    """A line for the person who starts the run, if there is something to know."""
    ends_after_steps: bool = False
    """Whether `reason_to_end` is asked after every step, which costs a collective, and not after evaluations only."""

    def attach(self, training: Training) -> None:
        """See all that is trained: called once, before `begin`. What is seen changes until then."""

    def begin(self, model: nn.Module) -> None:
        """Get ready: called once, with the weights of the first step in the model, before `load_state_dict`."""

    def before_backward(self, loss: Tensor) -> Tensor:
        """Return what is differentiated instead of a micro-batch's loss, a scalar."""
        return loss

    def after_backward(self, training: Training, step: Step) -> None:
        """Act on the averaged gradients, before they are clipped."""

    def after_update(self, training: Training, step: Step) -> None:
        """Act on the updated weights. On a GPU, read no tensor's value here: that would wait for the device."""

    def before_looking(self, training: Training) -> None:
        """Make equal on all ranks what is about to be evaluated, compared or saved. Collective."""

    def before_evaluation(self, training: Training) -> None:
        """Get ready for an evaluation of the held-out data, whose batches come next."""

    def after_evaluation(self, training: Training, metrics: Mapping[str, float]) -> None:
        """Act on the metrics of an evaluation, `val/loss` and so on, the same on all ranks. Collective.

        Not called where a stop cut it short. A save that is due at this step comes afterwards, and knows of it.
        """

    def lr_factor(self) -> float:
        """Return by what the scheduled learning rate of the next step is multiplied, alike on all ranks."""
        return 1.0

    def reason_to_end(self) -> str:
        """Return why the run should end here, as if this step were its last; empty: it goes on.

        One rank's reason is enough.
        """
        return ""

    def end(self, reason: str) -> None:
        """Learn that the run ends for a reason that some rank had."""

    def note_on_skip(self) -> str:
        """Return what to add to the message that the last step was skipped."""
        return ""

    def metrics(self, training: Training) -> dict[str, float]:
        """Return figures of the steps since the last call, the same on every rank: called when logging is due."""
        return {}

    def evaluated_weights(self) -> Mapping[str, Tensor] | None:
        """Return tensors, by their names in the model, that are evaluated and exported instead of the model's own.

        They must be what `state_dict()["weights"]` holds. None: the model's own are.
        """
        return None

    def close(self, is_agreed: bool) -> None:
        """Let go of what it holds: called once, when training ends. Collective where `is_agreed`.

        Where it is not, this rank alone has an exception, and no rank answers any more.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return what a run that goes on needs: tensors and plain values, nested in dicts and lists."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` returned."""

    def redistribute(self, states: Sequence[Mapping[str, Any]], rank: int) -> Mapping[str, Any] | None:
        """Return what this rank gets of per-rank states that another number of ranks saved; None: it begins anew."""
        return None


def acting(components: Sequence[Component], method: str) -> list[Component]:
    """Return those of the components that have a method of their own by this name: most leave most methods alone."""
    inherited = getattr(Component, method)
    return [item for item in components if getattr(getattr(item, method), "__func__", None) is not inherited]


ComponentFactory = Callable[["Job"], Component | None]
"""Builds a component for a job, or returns None where its settings do not ask for one."""


def nested_tensors(value: Any, name: str = "") -> dict[str, Tensor]:
    """Return the tensors in nested dicts, lists and tuples, by the keys that lead to them, joined by dots."""
    if isinstance(value, Tensor):
        return {name: value}
    items: Any = enumerate(value) if isinstance(value, list | tuple) else ()
    if isinstance(value, Mapping):
        items = value.items()
    found: dict[str, Tensor] = {}
    for key, item in items:
        found.update(nested_tensors(item, f"{name}.{key}" if name else str(key)))
    return found
