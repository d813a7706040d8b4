"""Attention that drops its weights, for the samples of a micro-batch.

As it is defined, T x T weights of each head are made, drawn for and dropped. A GPU's flash attention drops them where
it computes them; what it draws is a function of a seed and of the place of a weight among those of one sample, if it is
given one sample at a time. So each sample is one call, with a seed of its own: as many calls as samples, and no tensor
of T x T numbers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hvdtrain.models.linear import product_dtype

if TYPE_CHECKING:
    from hvdtrain.trainer.randomness import SampleRandomness

# Below so many weights of a sample, passes over all samples at once are the shorter way.
_LEAST_WEIGHTS = 1 << 20


def attention(
    self: SampleRandomness,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Answer `scaled_dot_product_attention` where its weights are dropped: fused kernels draw numbers of their own."""
    if dropout_p == 0:
        return NotImplemented
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    if attn_mask is None and _can_be_fused(query, key, value):
        seeds = self.next_seeds(query.shape)
        if seeds is not None:
            query, key, value = _as_for_flash(query, key, value)
            return one_by_one(seeds, query, key, value, dropout_p=dropout_p, is_causal=is_causal, scale=scale)
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        is_bool = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -torch.inf) if is_bool else scores + attn_mask
    weights = scores.softmax(-1)
    return _drop_weights(self, weights, dropout_p) @ value


def _drop_weights(self: SampleRandomness, weights: Tensor, p: float) -> Tensor:
    """Drop weights, `(n, ...)`; where that is not the samples, by torch's generator."""
    u = self.uniform(weights.shape, weights.device) if 0 < p < 1 else None
    if u is None:
        return F.dropout(weights, p)
    return weights * ((u >= p).to(weights.dtype) / (1 - p))


def _can_be_fused(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Return whether flash attention takes these, and saves anything. A compiler sees no seeds: not there."""
    if torch.compiler.is_compiling() or query.dim() != 4 or not query.is_cuda or query.shape != key.shape:
        return False
    if query.shape[1] * query.shape[2] * key.shape[2] < _LEAST_WEIGHTS:
        return False
    arguments: Any = (*_as_for_flash(query, key, value), None, 0.1, True, False)
    return torch.backends.cuda.can_use_flash_attention(torch.backends.cuda.SDPAParams(*arguments))


def _as_for_flash(*tensors: Tensor) -> list[Tensor]:
    """Return the tensors in the type in which autocast would have attention computed."""
    return [tensor.to(product_dtype(tensor)) for tensor in tensors]


def one_by_one(seeds: list[int], query: Tensor, key: Tensor, value: Tensor, **more: Any) -> Tensor:
    """Return attention of each sample by itself, after its device's generator was given the sample's seed.

    The generator is put back: what else draws from it draws what it would have.

    Args:
        seeds: of the samples.
        query: `(n, H, T, D)`.
        key: of the same shape.
        value: of the same shape.
        more: arguments of torch's attention.
    """
    device = query.device
    generator = torch.default_generator
    if device.type == "cuda":
        generator = torch.cuda.default_generators[device.index or 0]
    before = generator.get_state()
    found = []
    try:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            for i, seed in enumerate(seeds):
                generator.manual_seed(seed)
                own = slice(i, i + 1)
                found.append(F.scaled_dot_product_attention(query[own], key[own], value[own], **more))
    finally:
        generator.set_state(before)
    return torch.cat(found)


def multi_head_attention(self: SampleRandomness, *args: Any, **kwargs: Any) -> Any:
    """Run torch's own, whose inner calls find ours: a mode is off inside the function that it answers."""
    heads = int(kwargs["num_heads"] if "num_heads" in kwargs else args[4])

    def dropout(weights: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        """Drop `(n x heads, T, S)`, as weights that are asked for come, by sample."""
        if not training or not p:
            return weights
        return _drop_weights(self, torch.unflatten(weights, 0, (-1, heads)), p).flatten(0, 1)

    def inner(*args: Any, **kwargs: Any) -> Any:
        answer = attention(self, *args, **kwargs)
        return original(*args, **kwargs) if answer is NotImplemented else answer

    original = F.scaled_dot_product_attention
    with _replaced("dropout", dropout), _replaced("scaled_dot_product_attention", inner):
        return F.multi_head_attention_forward(*args, **kwargs)


@contextlib.contextmanager
def _replaced(name: str, function: Callable[..., Any]) -> Iterator[None]:
    original = getattr(F, name)
    setattr(F, name, function)
    try:
        yield
    finally:
        setattr(F, name, original)
