"""Closures that are given to `step`: their gradients, and their loss, are the mean over the ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hvdtrain.world.exchange import GradientExchange

if TYPE_CHECKING:
    from hvdtrain.world.world import World


def over_ranks(world: World, exchange: GradientExchange, closure: Callable[[], Any], name: str) -> Callable[[], Any]:
    """Return a closure for `step` that leaves averaged gradients and returns the mean loss, alike on all ranks.

    An optimizer that decides by the loss, such as LBFGS in its line search, would else decide differently on each.
    """

    def of_all() -> Any:
        exchange.end_step()
        loss = closure()
        exchange.finish()
        if loss is None:
            return None
        value = torch.as_tensor(loss, dtype=None if isinstance(loss, Tensor) else torch.float64).detach()
        mean = world.all_reduce(value, "mean", name)
        return mean if isinstance(loss, Tensor) else mean.item()

    return of_all
