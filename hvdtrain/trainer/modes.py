"""Which modules train and which are frozen in eval mode: as the user built them, after evaluations and on resume."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from hvdtrain.trainer.component import Component
from hvdtrain.trainer.job import Job


class Modes(Component):
    """Sets modes before the first step, and keeps them in checkpoints.

    A model whose modules are all in one mode, as they are when they are built or `from_pretrained` returns them, is put
    into training mode: a class whose own `train` keeps a part in eval mode does so then. Where some are and some are
    not, that is what its author wants: batch normalisation or an encoder that is frozen stays so.
    """

    name = "modes"

    def __init__(self, job: Job) -> None:
        self._model = model = job.task.model
        if not any(module.training for module in model.modules()):
            self.about = "modes:      the model was built in eval mode: it is trained in training mode"

    def begin(self, model: nn.Module) -> None:
        """Put the model into training mode, unless a part of it is."""
        self._model = model
        if len({module.training for module in model.modules()}) == 1:
            model.train()

    def state_dict(self) -> dict[str, Any]:
        """Return the names of the modules in eval mode."""
        return {"eval": [name for name, module in self._model.named_modules() if not module.training]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set every module's mode, each by itself: a module's `train` would set its parts' too."""
        in_eval = set(state["eval"])
        for name, module in self._model.named_modules():
            module.training = name not in in_eval


class Frozen(Component):
    """Keeps in checkpoints which weights are frozen: what the user's code has frozen or unfrozen while training.

    Comes after all others, which may freeze weights when they begin. A program that freezes others than the one that
    has begun the run is right: it is said, and nothing is changed.
    """

    name = "frozen"

    def __init__(self, job: Job) -> None:
        self._model, self._log = job.task.model, job.log
        self._at_start: list[str] = []

    def begin(self, model: nn.Module) -> None:
        """Note what is frozen before the first step of this start."""
        self._model = model
        self._at_start = self._now()

    def _now(self) -> list[str]:
        return [name for name, parameter in self._model.named_parameters() if not parameter.requires_grad]

    def state_dict(self) -> dict[str, Any]:
        """Return the names of the frozen weights, and of those that were so at the start; nothing while they are."""
        now = self._now()
        return {} if now == self._at_start else {"now": now, "at_start": self._at_start}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Freeze what was frozen, where this program has begun as that one has."""
        own, self._at_start = self._at_start, list(state["at_start"])
        if own == state["now"]:
            return
        if own != state["at_start"]:
            self._log.say("frozen:     other weights than when the run was saved: as this program has them")
            self._at_start = own
            return
        frozen = set(state["now"])
        for name, parameter in self._model.named_parameters():
            if parameter.requires_grad == (name in frozen):
                parameter.requires_grad_(name not in frozen)


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Have the whole model in eval mode for a while; each module is put back into its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, is_training in modes:
            module.training = is_training
