"""Attention in bfloat16 on CPUs by oneDNN's batched products, in the place of torch's kernel.

torch's kernel for CPUs multiplies small blocks by MKL, whose bfloat16 products use none of the instructions that some
CPUs have for them; oneDNN's, which torch brings along too, do: with its backward pass attention takes a third to a half
of the time (benchmarks/results/attention_bf16.txt).

It takes the place of torch's operator, below autograd and autocast, so that whatever model asks for
`scaled_dot_product_attention` has it: the decoder's, transformers', `nn.MultiheadAttention`, compiled or not.

Shapes: B samples, H heads of queries, K of keys and values, T queries, S keys, D numbers a head.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hvdtrain.models.private_attention import AttentionKernels, softmax, softmax_gradient

# Fewer multiplications than these for the scores, and torch's one call is the faster one.
_FEWEST_PRODUCTS = 1 << 21
# Queries at a time. More than these at a time do not fit into a core's cache with their weights; with fewer, sums over
# many blocks lose digits.
_BLOCK, _LONG_BLOCK = 128, 256

_kernels: AttentionKernels | None = None
_is_on = False


def use_onednn_attention(is_wanted: bool) -> None:
    """Have attention in bfloat16 on this process's CPU computed by oneDNN's products from now on, or by torch's kernel.

    Whether the CPU has them is the caller's to know.
    """
    global _kernels, _is_on
    _is_on = is_wanted
    if is_wanted and _kernels is None:
        with warnings.catch_warnings():  # that a kernel of torch is replaced
            warnings.simplefilter("ignore", UserWarning)
            _kernels = AttentionKernels(_forward, _backward)


def _suits(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool) -> bool:
    if not all(tensor.dtype == torch.bfloat16 and tensor.dim() == 4 for tensor in (query, key, value)):
        return False
    if attn_mask is not None and (is_causal or attn_mask.dim() not in (2, 4)):
        return False
    heads, groups = query.shape[1], key.shape[1]
    has_groups = groups > 0 and heads % groups == 0 and value.shape[:3] == key.shape[:3]
    return has_groups and query.numel() * key.shape[2] >= _FEWEST_PRODUCTS


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return attention, `(B, H, T, D)`, and `(B, H, T)` without a number: weights are computed again from the scores.

    By these that are no numbers the backward pass knows whose forward pass it was.
    """
    assert _kernels is not None
    if not _is_on or dropout_p or not _suits(query, key, value, attn_mask, is_causal):
        found: tuple[Tensor, Tensor] = _kernels.forward(query, key, value, dropout_p, is_causal, attn_mask, scale)
        return found
    parts = _Parts(query, key, value, attn_mask, is_causal, scale)
    y = _like_tokens(query, value.shape[-1])
    for block in parts.blocks():
        seen = slice(0, block.weights.shape[2])
        y[:, :, block.rows] = torch.bmm(block.weights, parts.values[:, seen]).view(*block.shape, -1)
    return y, torch.full(query.shape[:3], math.nan, dtype=torch.float32)


def _backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of queries, keys and values.

    With P the weights, g the gradient of the output and f the scale: dv = P' g, ds = the softmax's gradient of g v',
    dq = f ds k, dk = f ds' q.
    """
    assert _kernels is not None
    if not logsumexp.numel() or not logsumexp.flatten()[0].isnan():
        others = (gradient, query, key, value, out, logsumexp, dropout_p, is_causal, attn_mask, scale)
        gradients: tuple[Tensor, Tensor, Tensor] = _kernels.backward(*others)
        return gradients
    parts = _Parts(query, key, value, attn_mask, is_causal, scale)
    dq = _like_tokens(query, query.shape[-1])
    dk, dv = torch.zeros_like(parts.keys), torch.zeros_like(parts.values)
    kept = 0.0  # the first sum begins anew
    for block in parts.blocks():
        seen = slice(0, block.weights.shape[2])
        above = gradient[:, :, block.rows].reshape(*block.queries.shape[:2], -1)
        dv[:, seen].baddbmm_(block.weights.transpose(1, 2), above, beta=kept)
        change = torch.bmm(above, parts.values[:, seen].transpose(1, 2))
        change = softmax_gradient(change, block.weights)
        dq[:, :, block.rows] = torch.bmm(change, parts.keys[:, seen]).mul_(parts.scale).view(*block.shape, -1)
        dk[:, seen].baddbmm_(change.transpose(1, 2), block.queries, beta=kept, alpha=parts.scale)
        kept = 1.0
    return dq, dk.view_as(key), dv.view_as(value)


def _like_tokens(query: Tensor, width: int) -> Tensor:
    """Return room for `(B, H, T, width)` in which a token's heads lie beside each other, as the next layer reads it."""
    samples, heads, tokens, _ = query.shape
    return query.new_empty(samples, tokens, heads, width).transpose(1, 2)


class _Block(NamedTuple):
    """Some queries of all heads."""

    rows: slice
    """Which queries of each head."""
    queries: Tensor
    """`(B K, H / K * rows, D)`, those of a group of heads one after the other."""
    weights: Tensor
    """`(B K, H / K * rows, keys)`, of the first keys: those that any of the queries sees."""
    shape: tuple[int, int, int]
    """B, H and the number of rows."""


class _Parts:
    """What both passes are made of: keys and values by groups of heads, and the weights of a block of queries."""

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
    ) -> None:
        samples, groups, num_keys, width = key.shape
        self._query, self._mask, self._is_causal = query, mask, is_causal
        self.keys = key.reshape(samples * groups, num_keys, width)
        self.values = value.reshape(samples * groups, num_keys, -1)
        self.scale = query.shape[-1] ** -0.5 if scale is None else scale

    def blocks(self) -> Iterator[_Block]:
        """Yield the blocks, in order."""
        samples, heads, tokens, width = self._query.shape
        size = _BLOCK if tokens <= 4 * _BLOCK else _LONG_BLOCK
        for first in range(0, tokens, size):
            last = min(first + size, tokens)
            rows, shape = slice(first, last), (samples, heads, last - first)
            queries = self._query[:, :, rows].reshape(len(self.keys), -1, width)
            yield _Block(rows, queries, self._weights(queries, rows, shape), shape)

    def _weights(self, queries: Tensor, rows: slice, shape: tuple[int, int, int]) -> Tensor:
        num_keys = self.keys.shape[1]
        seen = min(rows.stop, num_keys) if self._is_causal else num_keys
        scores = queries.new_empty(*queries.shape[:2], seen)
        by_head = scores.view(*shape, seen)
        is_none_seen = None
        if self._is_causal:
            hidden = torch.full((shape[2], seen), -torch.inf, dtype=scores.dtype).triu(rows.start + 1)
            by_head.copy_(hidden)
        elif self._mask is not None:
            added = self._mask if self._mask.shape[-2] == 1 else self._mask[..., rows, :]
            if added.dtype == torch.bool:
                added = torch.zeros(added.shape, dtype=scores.dtype).masked_fill_(~added, -torch.inf)
            by_head.copy_(added)
            is_none_seen = (added == -torch.inf).all(-1, keepdim=True)
        else:
            scores.zero_()
        scores.baddbmm_(queries, self.keys[:, :seen].transpose(1, 2), alpha=self.scale)
        weights = softmax(scores)
        if is_none_seen is not None and bool(is_none_seen.any()):
            weights.view(*shape, seen).masked_fill_(is_none_seen, 0.0)  # as torch has it
        return weights
