"""Norm and rotary positions with gradients written by hand: fewer passes over memory than autograd would make of them.

On CPUs a pass over activations costs as much as it reads and writes. What a GPU or a compiler fuses by itself is left
to them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class RMSNorm(nn.RMSNorm):
    """`nn.RMSNorm` (arXiv:1910.07467), in fewer passes where weights and activations lie on the CPU in fp32 or fp64."""

    def forward(self, x: Tensor) -> Tensor:
        """Map `(..., C)` to `(..., C)`."""
        is_plain = x.device.type == "cpu" and x.dtype == self.weight.dtype and x.dtype.itemsize >= 4
        if x.dtype.itemsize < self.weight.dtype.itemsize:  # torch has no kernel that takes both types
            x = x.to(self.weight.dtype)
        if not is_plain or torch.compiler.is_compiling():
            return super().forward(x)
        normed: Tensor = _Norm.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]
        return normed


class _Norm(torch.autograd.Function):
    """y = w x / r with r^2 = mean(x^2) + eps; dx = (w g - n mean(w g n)) / r with n = x / r, dw = sum(g n)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        size = x.shape[-1]
        inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(size).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        normed: Tensor = x * inverse
        return normed.mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        normed = x * inverse
        products = grad * normed
        along = (products @ weight).unsqueeze(-1).div_(-x.shape[-1])
        grad_weight = products.flatten(0, -2).sum(0)
        return (grad * weight).addcmul_(normed, along).mul_(inverse), grad_weight, None


def rotary_tables(positions: Tensor, head_size: int, theta: float, *, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cosines and signed sines, `(T, 1, D)` each, that turn channels by their position (arXiv:2104.09864).

    `positions` is int64 `(T,)`; or `(B, T)` where rows differ, and the tables are then `(B, T, 1, D)`.
    Channels i and i + D/2 are a pair ("rotate half", as transformers has it), turned by `position * theta^(-2i/D)`.
    They are computed afresh in each forward pass, which costs nothing beside a block and leaves no buffer to cast,
    move or save. On the device of `like`, in fp32, or in fp64 if `like` is fp64.
    """
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    exponents = torch.arange(0, head_size, 2, dtype=dtype, device=like.device) / head_size
    angles = positions.to(dtype)[..., None, None] * theta**-exponents  # (T, 1, D/2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each head of `x`, `(B, T, heads, D)`, by its position, with the tables of `rotary_tables`."""
    if torch.compiler.is_compiling():
        return _turn(x, *rope)
    turned: Tensor = _Rotation.apply(x, *rope)  # type: ignore[no-untyped-call]
    return turned


class _Rotation(torch.autograd.Function):
    """The gradient of a rotation is the gradient turned back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, signed_sin)
        return _turn(x, cos, signed_sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, signed_sin = ctx.saved_tensors
        return _turn(grad, cos, -signed_sin), None, None


def _turn(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    turned = x * cos  # in the tables' type, where that is finer
    turned[..., :half].addcmul_(x[..., half:], signed_sin[..., :half])
    turned[..., half:].addcmul_(x[..., :half], signed_sin[..., half:])
    return turned.to(x.dtype)
