"""An optimizer's parameters, and whether they are still the same."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence

import torch
from torch import nn


def owned_by(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Return the parameters that an optimizer moves, in the order of its groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def first_lazy(model: nn.Module) -> str:
    """Return the name of a parameter or buffer that gets its shape in the first forward pass; empty where none does."""
    named = (*model.named_parameters(), *model.named_buffers())
    return next((name for name, tensor in named if nn.parameter.is_lazy(tensor)), "")


def are_same(some: Sequence[object], others: Sequence[object]) -> bool:
    """Return whether both hold the same objects in the same order; `==` would compare the numbers of tensors."""
    return len(some) == len(others) and all(map(operator.is_, some, others))


class Ordered:
    """Sorts parameters as they lie in a model, others behind them; anew only where they are not those of before.

    Args:
        model_order: the model's parameters.
    """

    def __init__(self, model_order: Iterable[nn.Parameter]) -> None:
        self._place = {parameter: place for place, parameter in enumerate(model_order)}
        self._before: list[nn.Parameter] = []
        self._sorted: list[nn.Parameter] = []

    def __call__(self, parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
        """Return them in order, in a list that is not to be changed."""
        if not are_same(parameters, self._before):
            last = len(self._place)
            self._before = [*parameters]
            self._sorted = sorted(parameters, key=lambda parameter: self._place.get(parameter, last))
        return self._sorted
