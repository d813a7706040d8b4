"""What torch does not promise to keep of its attention on CPUs: seen in torch 2.13."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def can_be_replaced() -> bool:
    """Return whether this torch can tell what kernel it has, so that another one can call it: from 2.9 on."""
    return hasattr(torch.library, "get_kernel")


class AttentionKernels:
    """Puts functions in the place of torch's kernel for attention on CPUs, for as long as the process lives.

    Args:
        forward: takes its arguments as `aten::_scaled_dot_product_flash_attention_for_cpu` does, by name what follows
            its star.
        backward: the same of its gradient.
    """

    def __init__(self, forward: Callable[..., Any], backward: Callable[..., Any]) -> None:
        name = "_scaled_dot_product_flash_attention_for_cpu"
        self._own = [torch.library.get_kernel(f"aten::{own}", "CPU") for own in (name, f"{name}_backward")]
        self._keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
        library: Any = torch.library.Library
        self._library = library("aten", "IMPL")  # what it put in goes with it
        self._library.impl(name, forward, "CPU")
        self._library.impl(f"{name}_backward", backward, "CPU")

    def forward(self, *arguments: Any) -> Any:
        """Call torch's own kernel; mask and scale come last."""
        *most, mask, scale = arguments
        return self._own[0].call_boxed(self._keys, *most, attn_mask=mask, scale=scale)

    def backward(self, *arguments: Any) -> Any:
        """Call torch's own kernel for gradients; mask and scale come last."""
        *most, mask, scale = arguments
        return self._own[1].call_boxed(self._keys, *most, attn_mask=mask, scale=scale)


def softmax(scores: Tensor) -> Tensor:
    """Return the softmax over the last dimension in the same type, also where autocast would have it in fp32."""
    weights: Tensor = torch.ops.aten._softmax.default(scores, -1, False)
    return weights


def softmax_gradient(gradient: Tensor, weights: Tensor) -> Tensor:
    """Return the gradient of what a softmax over the last dimension was given; it was to give `weights`."""
    change: Tensor = torch.ops.aten._softmax_backward_data.default(gradient, weights, -1, weights.dtype)
    return change
