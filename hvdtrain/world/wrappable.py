"""Which optimizers can be wrapped, and why others cannot."""

from __future__ import annotations

from typing import Any

import torch

from hvdtrain.errors import ConfigError
from hvdtrain.optim.private_optimizer import PASSED_ON


def check_can_be_wrapped(optimizer: Any, wrapped: type[torch.optim.Optimizer]) -> None:
    """Raise ConfigError where an object is no optimizer that can become one of the class `wrapped`."""
    if isinstance(optimizer, wrapped):
        raise ConfigError("this optimizer is wrapped already: wrap() changes the optimizer that it is given")
    kind = type(optimizer)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(
            f"wrap(optimizer, model) was given an object of type {kind.__name__} as the optimizer: give a"
            " torch.optim.Optimizer; where one of your own stands around it, that which is inside"
        )
    if not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        raise ConfigError(
            f"{kind.__name__} is no whole torch optimizer: it has not called torch.optim.Optimizer.__init__."
            " Wrap the optimizer that is inside it, before it is made"
        )
    # Its own would be written over, or be found in the place of what belongs there.
    taken = sorted((_names_of(wrapped) - PASSED_ON) & {*vars(optimizer), *_names_of(kind)})
    if taken:
        raise ConfigError(
            f"{kind.__name__} has something of its own by the name of {', '.join(taken)}, which a wrapped optimizer"
            " has, too: give it another name"
        )


def _names_of(kind: type[torch.optim.Optimizer]) -> set[str]:
    """Return what a class has, or those that it derives from, besides what every optimizer has."""
    own = [parent for parent in kind.__mro__ if parent not in torch.optim.Optimizer.__mro__]
    names = {name for parent in own for name in (*vars(parent), *vars(parent).get("__annotations__", ()))}
    return {name for name in names if not name.startswith("__") and not hasattr(torch.optim.Optimizer, name)}
