"""Every use of what torch does not promise to keep, in one file: each seen in torch 2.13.

Who changes torch's version looks here first. Nothing else in hvdtrain reaches into torch's private names.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

__all__ = [
    "BatchNorm",
    "FakeTensorMode",
    "can_skip_by_itself",
    "is_transformed",
    "run_backward",
    "skipping_where",
]


def can_skip_by_itself(optimizer: torch.optim.Optimizer) -> bool:
    """Tell whether the optimizer takes a step or not as a tensor on its device says: fused ones do.

    The attribute is the one by which `torch.amp.GradScaler` knows them.
    """
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


@contextlib.contextmanager
def skipping_where(optimizer: Any, is_skipped: Tensor) -> Iterator[None]:
    """Within, such an optimizer's `step` leaves everything as it is where `is_skipped`, bool, a scalar, is True."""
    optimizer.found_inf = is_skipped.float()
    try:
        yield
    finally:
        del optimizer.found_inf


def run_backward(
    tensor: Tensor,
    gradient: Tensor,
    retain_graph: bool,
    create_graph: bool,
    inputs: Sequence[Tensor],
) -> None:
    """Run the backward pass as `torch.autograd.backward` does, with the torch function modes that are active."""
    engine: Any = torch.autograd.Variable._execution_engine
    engine.run_backward(
        (tensor,), (gradient,), retain_graph, create_graph, tuple(inputs), allow_unreachable=True, accumulate_grad=True
    )


def is_transformed() -> bool:
    """Tell whether `torch.func` (grad, vmap, ...) is at work: functions without rules for it must stay out."""
    return bool(torch._C._are_functorch_transforms_active())
