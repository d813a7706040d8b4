"""A closure that is given to an optimizer's step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def loss_of(closure: Callable[[], Any] | None) -> Any:
    """Return what a closure does, with gradients also within `torch.no_grad()`; None where there is none."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
