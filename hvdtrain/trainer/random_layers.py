"""Layers that draw random numbers, for the samples of a micro-batch: dropout and its like."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hvdtrain.models.private_torch import run_backward
from hvdtrain.trainer.random_attention import attention, multi_head_attention

if TYPE_CHECKING:
    from hvdtrain.trainer.randomness import SampleRandomness


def _dropout(
    self: SampleRandomness, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Any:
    if not training or not 0 < p < 1:
        return NotImplemented
    return _drop(self, input, p, input.shape, inplace)


def _dropout_(self: SampleRandomness, input: Tensor, p: float, train: bool) -> Any:
    return _dropout(self, input, p, train, inplace=True)


def _native_dropout(self: SampleRandomness, input: Tensor, p: float, train: bool | None) -> Any:
    """Return what is left, and which numbers are."""
    kept = _dropout(self, torch.ones_like(input), p, train is not False)
    return NotImplemented if kept is NotImplemented else (input * kept, kept != 0)


def _feature_dropout(
    self: SampleRandomness, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Any:
    """Drop whole channels of `(n, C, ...)`."""
    if not training or not 0 < p < 1 or input.dim() < 3:
        return NotImplemented
    return _drop(self, input, p, (*input.shape[:2], *[1] * (input.dim() - 2)), inplace)


def _drop(self: SampleRandomness, x: Tensor, p: float, mask_shape: Sequence[int], inplace: bool) -> Any:
    u = self.uniform(mask_shape, x.device)
    if u is None:
        return NotImplemented
    mask = (u >= p).to(x.dtype) / (1 - p)
    return x.mul_(mask) if inplace else x * mask


def _backward(
    self: SampleRandomness,
    tensor: Tensor,
    gradient: Tensor | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: Sequence[Tensor] | None = None,
) -> None:
    """Stay entered: a mode is off inside the function that it answers, but activation checkpoints recompute there.

    Hence the engine itself, which `torch.autograd.backward`, such a function too, calls.
    """
    gradient = torch.ones_like(tensor) if gradient is None else gradient
    keep_graph = create_graph if retain_graph is None else retain_graph
    with self:
        run_backward(tensor, gradient, keep_graph, create_graph, tuple(inputs or ()))


def _gumbel_softmax(
    self: SampleRandomness, logits: Tensor, tau: float = 1, hard: bool = False, eps: float = 1e-10, dim: int = -1
) -> Any:
    """arXiv:1611.01144, equation 2; `hard` with the gradient of the soft one."""
    u = self.fine(logits.shape, logits.device)
    if u is None:
        return NotImplemented
    gumbels = -torch.log(-torch.log(u + 2.0**-54)).to(logits.dtype)
    soft = ((logits + gumbels) / tau).softmax(dim)
    if not hard:
        return soft
    chosen = soft.max(dim, keepdim=True)[1]
    return torch.zeros_like(logits).scatter_(dim, chosen, 1.0) - soft.detach() + soft


def _rrelu(
    self: SampleRandomness,
    input: Tensor,
    lower: float = 1.0 / 8,
    upper: float = 1.0 / 3,
    training: bool = False,
    inplace: bool = False,
) -> Any:
    u = self.uniform(input.shape, input.device) if training else None
    if u is None:
        return NotImplemented
    slope = torch.where(input < 0, (lower + (upper - lower) * u).to(input.dtype), 1.0)
    return input.mul_(slope) if inplace else input * slope


def _rrelu_(self: SampleRandomness, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    return _rrelu(self, input, *args, **{**kwargs, "inplace": True})


def _alpha_dropout(
    self: SampleRandomness, input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False
) -> Any:
    return _alpha_drop(self, input, p, training, inplace, input.shape)


def _feature_alpha_dropout(
    self: SampleRandomness, input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False
) -> Any:
    return _alpha_drop(self, input, p, training, inplace, (*input.shape[:2], *[1] * (input.dim() - 2)))


def _alpha_drop(
    self: SampleRandomness, x: Tensor, p: float, training: bool, inplace: bool, mask_shape: Sequence[int]
) -> Any:
    """arXiv:1706.02515, section 3: what is dropped becomes SELU's lowest value, and mean and variance stay."""
    u = self.uniform(mask_shape, x.device) if training and 0 < p < 1 else None
    if u is None:
        return NotImplemented
    lowest, keep = -1.7580993408473766, 1 - p
    scale = (keep + lowest**2 * keep * p) ** -0.5
    dropped = torch.where(u >= p, x, lowest) * scale - scale * lowest * p
    return x.copy_(dropped) if inplace else dropped


def _by_train(answer: Callable[..., Any]) -> Callable[..., Any]:
    """Return the answer to torch's own function of this name, which has other arguments than `nn.functional`'s."""

    def call(self: SampleRandomness, input: Tensor, p: float, train: bool) -> Any:
        return answer(self, input, p, train)

    return call


LAYERS: dict[Any, Callable[..., Any]] = {
    torch.Tensor.backward: _backward,
    F.dropout: _dropout,
    torch.dropout: _by_train(_dropout),
    torch.dropout_: _dropout_,
    torch.native_dropout: _native_dropout,
    F.dropout1d: _feature_dropout,
    F.dropout2d: _feature_dropout,
    F.dropout3d: _feature_dropout,
    torch.feature_dropout: _by_train(_feature_dropout),
    F.alpha_dropout: _alpha_dropout,
    torch.alpha_dropout: _by_train(_alpha_dropout),
    F.feature_alpha_dropout: _feature_alpha_dropout,
    torch.feature_alpha_dropout: _by_train(_feature_alpha_dropout),
    F.rrelu: _rrelu,
    F.rrelu_: _rrelu_,
    torch.rrelu: _rrelu,
    F.gumbel_softmax: _gumbel_softmax,
    F.scaled_dot_product_attention: attention,
    F.multi_head_attention_forward: multi_head_attention,
}
