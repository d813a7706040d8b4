"""What torch does not promise to keep of a tensor: who else holds it or its memory, and what it is within."""

from __future__ import annotations

import sys
from collections import OrderedDict
from typing import Any, cast

import torch
from torch import Tensor


def holders_of(tensor: Tensor) -> int:
    """Return how many tensors share a tensor's memory, with it and torch's own bookkeeping counted."""
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata))


def _references_to(parameter: Tensor) -> int:
    gradient = parameter.grad
    return sys.getrefcount(gradient)


def _least_holders() -> tuple[int, int]:
    """Return what the two counts are for a gradient that nobody else holds: versions of Python and torch differ."""
    parameter = torch.zeros(1, requires_grad=True)
    parameter.grad = torch.zeros(1)
    return holders_of(parameter.grad), _references_to(parameter)


_HOLDERS, _REFERENCES = _least_holders()


def is_held_by_others(parameter: Tensor, lying_together: int = 1) -> bool:
    """Return whether anybody but a parameter has its gradient, or memory of it: a list, or a flat buffer.

    `lying_together` gradients of parameters are known to lie in the same memory.
    """
    gradient = parameter.grad
    if gradient is None:
        return False
    holders = holders_of(gradient)
    del gradient
    return holders >= _HOLDERS + lying_together or _references_to(parameter) > _REFERENCES


def identity_of(tensor: Tensor) -> int:
    """Return what tells a tensor's insides from others: `torch.utils.swap_tensors` exchanges them, hooks included.

    `model.to(...)` does so for some subclasses, and where torch's `set_swap_module_params_on_conversion` says so.
    """
    return int(cast(Any, tensor)._cdata)


def drop_lost_hooks(parameter: Tensor) -> None:
    """Have hooks on a gradient's additions be called that are registered from now on.

    torch lists those that were lost with a tensor's insides as if they were there, and would add new ones to these.
    """
    cast(Any, parameter)._post_accumulate_grad_hooks = OrderedDict()


def version_of(tensor: Tensor) -> int:
    """Return how often a tensor has been changed in place, or one that shares its memory."""
    return tensor._version
