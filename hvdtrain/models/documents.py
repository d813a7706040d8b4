"""Attention within documents that lie one after the other: without a mask, where a GPU has a kernel for it.

A mask is T x T numbers a sample, and rules out flash attention (arXiv:2307.08691). Its kernel for sequences of other
lengths takes the documents' bounds instead. Whether it is there, and computes the same, is tried out once.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import logging
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hvdtrain.models.private_torch import without_modes

_log = logging.getLogger(__name__)


class Bounds(NamedTuple):
    """Documents of a batch of B samples of T tokens."""

    starts: Tensor
    """int32 `(n + 1,)`, where each begins in the flattened batch, then B T. Some may be empty."""
    longest: int
    """No document has more tokens."""


def bounds_of(starts: Tensor, length: int) -> Bounds:
    """Return the bounds of all documents of a batch, on the device of `starts`; nothing waits for it.

    Args:
        starts: int32 `(B, n)`, where they begin in each sample, filled up with T.
        length: T.
    """
    offsets = torch.arange(0, len(starts) * length, length, dtype=torch.int32, device=starts.device)
    end = torch.full((1,), len(starts) * length, dtype=torch.int32, device=starts.device)
    return Bounds(torch.cat(((starts + offsets.view(-1, 1)).flatten(), end)), length)


class Scores(NamedTuple):
    """What attention does besides."""

    scale: float | None = None
    """Of the products of queries and keys; None: 1 / sqrt(D)."""
    window: int | None = None
    """How many tokens one sees, itself among them; None: all before it in its document."""


_PLAIN = Scores()
_KERNEL_TYPES = (torch.float16, torch.bfloat16)


def attend(query: Tensor, key: Tensor, value: Tensor, bounds: Bounds, scores: Scores = _PLAIN) -> Tensor:
    """Return causal attention within documents, `(B, H, T, D)`, of such queries to keys and values `(B, K, T, D)`.

    On a GPU in 16 bits by the kernel, which `has_kernel` has been asked for; else in plain steps.
    """
    q, k, v = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))  # (B T, heads, D)
    is_for_kernel = query.is_cuda and query.dtype in _KERNEL_TYPES
    out = _by_kernel(q, k, v, bounds, scores) if is_for_kernel else _one_by_one(q, k, v, bounds, scores)
    return torch.unflatten(out, 0, (len(query), -1)).transpose(1, 2)


def _by_kernel(query: Tensor, key: Tensor, value: Tensor, bounds: Bounds, scores: Scores) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    starts, longest = bounds
    more: dict[str, Any] = {}
    if key.shape[1] != query.shape[1] and "enable_gqa" in inspect.signature(varlen_attn).parameters:
        more["enable_gqa"] = True  # torch before 2.12 takes groups without being asked to
    if scores.scale is not None:
        more["scale"] = scores.scale
    window = (-1 if scores.window is None else scores.window - 1, 0)
    out = varlen_attn(query, key, value, starts, starts, longest, longest, window_size=window, **more)
    assert isinstance(out, Tensor)
    return out


def _one_by_one(query: Tensor, key: Tensor, value: Tensor, bounds: Bounds, scores: Scores = _PLAIN) -> Tensor:
    """Compute the same in plain steps."""
    is_grouped = key.shape[1] != query.shape[1]
    found, places = [], bounds.starts.tolist()
    for start, end in itertools.pairwise(places):
        if start < end:
            q, k, v = (tensor[start:end].transpose(0, 1)[None] for tensor in (query, key, value))
            seen = _within(scores.window, end - start, query.device)
            out = F.scaled_dot_product_attention(
                q, k, v, seen, is_causal=seen is None, scale=scores.scale, enable_gqa=is_grouped
            )
            found.append(out[0].transpose(0, 1))
    return torch.cat(found)


def _within(window: int | None, length: int, device: torch.device) -> Tensor | None:
    """Return who sees whom in a document, bool `(length, length)`; None where that is all before oneself."""
    if window is None or length <= window:
        return None
    return torch.ones(length, length, dtype=torch.bool, device=device).tril().triu(1 - window)


@functools.cache
def has_kernel(
    device: torch.device, dtype: torch.dtype, heads: int, groups: int, head_size: int, scores: Scores = _PLAIN
) -> bool:
    """Return whether the kernel is there for these heads, and what it computes is what a mask does, to rounding.

    Args:
        device: of the model.
        dtype: in which attention is computed.
        heads: of queries.
        groups: heads of keys and values.
        head_size: D.
        scores: what it is asked for besides.
    """
    if device.type != "cuda" or dtype not in _KERNEL_TYPES:
        return False
    try:
        with without_modes():  # it is to be run, whatever the model is run for now
            if _is_right(device, dtype, (heads, groups, groups), head_size, scores):
                return True
            why = "it computes something else here"
    except Exception as error:  # of any kind: not built, not for this card, other arguments in this version of torch
        why = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    _log.warning("documents are kept apart by masks, which take more time and memory than the kernel for them: %s", why)
    return False


def _is_right(
    device: torch.device, dtype: torch.dtype, heads: tuple[int, int, int], head_size: int, scores: Scores = _PLAIN
) -> bool:
    """Compare outputs and gradients with plain steps in fp32, on two samples of three documents."""
    if scores.window is not None:  # one that matters in documents that are so short
        scores = scores._replace(window=min(scores.window, 17))
    generator = torch.Generator().manual_seed(0)
    length = 96
    starts = torch.tensor([[0, 40, length, length], [0, 1, 64, length]], dtype=torch.int32)
    inputs = [torch.randn(2, n, length, head_size, generator=generator).to(dtype) for n in heads]
    found = []
    for where, kind in ((device, dtype), (torch.device("cpu"), torch.float32)):
        own = [tensor.to(where, kind).requires_grad_() for tensor in inputs]
        with torch.enable_grad(), torch.autocast(where.type, enabled=False):
            out = attend(own[0], own[1], own[2], bounds_of(starts.to(where), length), scores)
            gradients = torch.autograd.grad(out.float().square().sum(), own)
        found.append([tensor.detach().float().cpu() for tensor in (out, *gradients)])
    return all(bool((a - b).norm() < 0.02 * b.norm()) for a, b in zip(*found, strict=True))
