"""An optimizer's state, loaded so that it goes on bit by bit and schedulers keep what they hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from hvdtrain.models.walk import owned_by


def load_in_place(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load a state; parameter groups, and tensors in them, stay the objects that schedulers hold."""
    groups = optimizer.param_groups
    before = [dict(group) for group in groups]
    optimizer.load_state_dict(cast(Any, state))
    loaded, optimizer.param_groups = optimizer.param_groups, groups
    for group, old, new in zip(groups, before, loaded, strict=True):
        for key, value in new.items():
            if isinstance(value, Tensor) and isinstance(old.get(key), Tensor):
                value = old[key].copy_(value)
            group[key] = value


def restore_types(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Give loaded entries back the type that they were saved in: torch's `load_state_dict` casts to the parameter's.

    NAdam's running product, for one, is fp32 beside fp64 parameters, and would go on with other last bits.
    """
    saved = state.get("state")
    if not isinstance(saved, Mapping):
        return  # a form of the class's own, which it has loaded itself
    for place, parameter in enumerate(owned_by(optimizer)):
        for name, value in saved.get(place, {}).items():
            loaded = optimizer.state[parameter].get(name)
            if isinstance(value, Tensor) and isinstance(loaded, Tensor) and loaded.dtype != value.dtype:
                optimizer.state[parameter][name] = value.detach().clone().to(loaded.device)
