"""A model, or an optimizer's groups, that are others in the midst of a run: not trained, or in no run that goes on."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor, nn

from hvdtrain.errors import ConfigError, listed
from hvdtrain.models.walk import owned_by
from hvdtrain.models.weights import shapes_of
from hvdtrain.world import WrappedOptimizer

if TYPE_CHECKING:
    from hvdtrain.trainer.state import Training

_NAMED = 3


class Structure:
    """What a model and its optimizer consist of at the start; code of a user's own may change it after any step.

    Args:
        model: as training begins.
        optimizer: of it.
    """

    def __init__(self, model: nn.Module, optimizer: WrappedOptimizer) -> None:
        self.shapes = shapes_of(model)
        self._parameters = {name: weakref.ref(parameter) for name, parameter in model.named_parameters()}
        self._groups = _lengths(optimizer)
        self._said: set[str] = set()

    def news(self, training: Training) -> Iterator[str]:
        """Yield what has become another thing since the start, and what that means; each is said once.

        Raises:
            ConfigError: the optimizer has lost a parameter whose state it has: nothing of it could be saved.
        """
        _check_states(training.optimizer)
        for kind, text in (("replaced", self._replaced(training)), ("cannot go on", self._other(training))):
            if text and kind not in self._said:
                self._said.add(kind)
                yield text

    def _replaced(self, training: Training) -> str:
        """Say which parameters are other objects that no optimizer has."""
        sharding = training.optimizer.sharding
        moved = {*(sharding.parameters if sharding is not None else owned_by(training.optimizer))}
        named = training.model.named_parameters()
        others = [
            name
            for name, parameter in named
            if parameter.requires_grad
            and parameter not in moved
            and (name not in self._parameters or self._parameters[name]() is not parameter)
        ]
        if not others:
            return ""
        return (
            f"WARNING: {listed(others, _NAMED)} of the model became another parameter while it was trained, which the"
            " optimizer does not have: it is not trained. Change the numbers of the one that was there, as by"
            " parameter.data.copy_(...) or layer.reset_parameters(), or make it in build()"
        )

    def _other(self, training: Training) -> str:
        """Say what a checkpoint holds that a run which goes on would not have."""
        now = shapes_of(training.model)
        odd = sorted(name for name in now.keys() | self.shapes.keys() if now.get(name) != self.shapes.get(name))
        parts = [f"{listed(odd, _NAMED)} of the model"] if odd else []
        parts += ["the optimizer's parameter groups"] if _lengths(training.optimizer) != self._groups else []
        if not parts:
            return ""
        return (
            f"WARNING: other than at the start: {' and '.join(parts)}. A run could not go on from a checkpoint with"
            " these, as it begins with what build() and build_optimizer() make: have them make all of it, and freeze"
            " what is not to learn yet by requires_grad_(False)"
        )


def _check_states(optimizer: WrappedOptimizer) -> None:
    """Raise ConfigError where a parameter is in no group any more: torch's state_dict() ends in a KeyError then."""
    owned = {*owned_by(optimizer)}
    lost = [owner for owner in optimizer.state if isinstance(owner, Tensor) and owner not in owned]
    if lost:
        raise ConfigError(
            f"{len(lost)} of the optimizer's parameters, the first of shape {tuple(lost[0].shape)}, were taken out of"
            " its groups while it was trained, and their state was left, which cannot be saved so: leave them there,"
            " and freeze them by requires_grad_(False)"
        )


def _lengths(optimizer: WrappedOptimizer) -> list[int]:
    return [len(group["params"]) for group in optimizer.param_groups]
