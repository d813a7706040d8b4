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

    A model whose modules are all in eval mode, as `from_pretrained` returns it, is put into training mode. Where some
    are and some are not, that is what its author wants: batch normalisation or an encoder that is frozen stays so.
    """

    name = "modes"

    def __init__(self, job: Job) -> None:
        self._model = model = job.task.model
        if not any(module.training for module in model.modules()):
            self.about = "modes:      the model was built in eval mode: it is trained in training mode"

    def begin(self, model: nn.Module) -> None:
        """Put the model into training mode, unless a part of it is."""
        self._model = model
        if not any(module.training for module in model.modules()):
            model.train()

    def state_dict(self) -> dict[str, Any]:
        """Return the names of the modules in eval mode."""
        return {"eval": [name for name, module in self._model.named_modules() if not module.training]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set every module's mode, each by itself: a module's `train` would set its parts' too."""
        in_eval = set(state["eval"])
        for name, module in self._model.named_modules():
            module.training = name not in in_eval


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
