"""The decoder's forward pass of one more token of each row: what generating text spends its time in.

A token of a small model is a hundred products of a vector and a matrix, each of some microseconds, and what surrounds
them costs as much. So what does not change from token to token is made once: weights that read the same input are one
matrix, which has the norm's weights in it; results go into memory that is there already; every view is made once, and
those of keys and values anew only when the room that attention looks at grows.

The decoder's own forward pass is the reference: tests hold the two to each other.

Shapes: B rows, K key/value heads, G query heads of each, D channels of a head, C = hidden_size, F = feed_forward_size,
M places of the cache, P places of it that attention looks at now.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from hvdtrain.models.cache import Cache, LayerCache
    from hvdtrain.models.config import DecoderConfig
    from hvdtrain.models.decoder import Decoder

# Attention looks at a multiple of so many places, those not yet read masked.
_ROOM = 32
# Weights that would take more are not copied: products of that size take longer than anything around them.
_MOST_PACKED_BYTES = 2**30


def suits(model: Decoder) -> bool:
    """Return whether the model's next tokens can be read this way: where no gradients are wanted, in fp32 or fp64."""
    weight = model.lm_head.weight
    if torch.is_grad_enabled() or torch.is_autocast_enabled(weight.device.type) or torch.compiler.is_compiling():
        return False
    return weight.dtype in (torch.float32, torch.float64) and _packed_bytes(model) <= _MOST_PACKED_BYTES


def _packed_bytes(model: Decoder) -> int:
    config = model.config
    rows = 2 * (config.num_heads + config.kv_heads) * config.head_size + 3 * config.feed_forward_size
    numbers = (config.num_layers * rows + model.vocab_size) * config.hidden_size
    return numbers * model.lm_head.weight.dtype.itemsize


class OneToken:
    """Maps the next token of each row to logits, and puts its keys and values into the cache.

    Args:
        model: the decoder; its weights must not change any more.
        cache: of this decoder.
        rope: cosines and signed sines of positions 0 to M - 1, `(M, 1, D)` each, as `rotary_tables` has them.
    """

    def __init__(self, model: Decoder, cache: Cache, rope: tuple[Tensor, Tensor]) -> None:
        config, like = model.config, model.lm_head.weight
        self._cache = cache
        self._num_read = -1  # not the cache's: positions and mask are to be made
        self._room = 0
        self._embedding = model.model.embed_tokens.weight
        B, C, D, K = len(cache.padding), config.hidden_size, config.head_size, config.kv_heads
        G = config.num_heads // K
        self._rows = B * K
        self._scale = D**-0.5
        # RMSNorm divides by the root of mean(x^2) + eps, which is the norm of (x, sqrt(C eps)) over sqrt(C): the stream
        # has that number beside x, and weights have the factor sqrt(C).
        stream = _empty(like, B, C + 1)
        stream[:, C] = (C * config.norm_eps) ** 0.5
        self._stream, self._x = stream, stream[:, :C]
        self._norm, self._normed = _empty(like, B, 1), _empty(like, B, C)
        self._head = _transposed(like * (model.model.norm.weight * C**0.5))
        blocks: Iterable[Any] = model.model.layers
        self._layers = [_pack(block, layer, config, G) for block, layer in zip(blocks, cache.layers, strict=True)]
        inner = config.feed_forward_size
        both = _empty(like, B, 2 * inner)
        self._gate_up, self._gate, self._up = both, both[:, :inner], both[:, inner:]
        self._inner = _empty(like, B, inner)
        self._mask = _empty(like, B, K, 1, cache.max_length)
        self._make_heads(B, K, G, D, rope)

    def _make_heads(self, B: int, K: int, G: int, D: int, rope: tuple[Tensor, Tensor]) -> None:
        """Make the memory of queries, keys and values, and the views of it."""
        like = self._embedding
        # Each key head comes with the query heads that look at it, and with its values, whose "rotation" is none.
        cos, signed_sin = rope
        tables = cos.expand(-1, G + 1, -1), torch.ones_like(cos), signed_sin
        self._table = torch.cat(tables, 1).to(like)  # (M, G + 3, D)
        turning = _empty(like, B, G + 3, D)
        self._turning = turning
        self._cos = turning[:, None, : G + 2]  # (B, 1, G + 2, D)
        self._sines = turning[:, None, G + 2 :, : D // 2], turning[:, None, G + 2 :, D // 2 :]  # (B, 1, 1, D/2)
        heads, turned = _empty(like, 2, B, K, G + 2, D)
        self._heads_flat, self._heads, self._turned = heads.view(B, -1), heads, turned
        self._halves = heads[:, :, : G + 1, : D // 2], heads[:, :, : G + 1, D // 2 :]
        self._turned_halves = turned[:, :, : G + 1, : D // 2], turned[:, :, : G + 1, D // 2 :]
        flat = turned.flatten(0, 1)  # (B K, G + 2, D)
        self._queries, self._new = flat[:, :G], flat[:, G:, None]
        attended = _empty(like, B * K, G, D)
        self._attended, self._attended_flat = attended, attended.view(B, -1)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Map tokens, int64 `(B, 1)`, that follow those in the cache, to logits `(B, V)`."""
        if self._num_read != self._cache.length:
            self._begin()
        x, normed, gate = self._x, self._normed, self._gate
        (low, high), (turned_low, turned_high) = self._halves, self._turned_halves
        minus_sin, sin = self._sines
        x.copy_(F.embedding(tokens[:, 0], self._embedding))
        self._step_on()
        mask = self._seen
        for layer, (keys, values) in zip(self._layers, self._views, strict=True):
            self._divide()
            torch.mm(normed, layer.heads, out=self._heads_flat)
            torch.mul(self._heads, self._cos, out=self._turned)
            turned_low.addcmul_(high, minus_sin)
            turned_high.addcmul_(low, sin)
            layer.cache.index_copy_(2, self._place, self._new)
            weights = torch.softmax(torch.baddbmm(mask, self._queries, keys, alpha=self._scale), 2)
            torch.bmm(weights, values, out=self._attended)
            x.addmm_(self._attended_flat, layer.output)
            self._divide()
            torch.mm(normed, layer.gate_up, out=self._gate_up)
            F.silu(gate, inplace=True)
            torch.mul(gate, self._up, out=self._inner)
            x.addmm_(self._inner, layer.down)
        self._divide()
        return torch.mm(normed, self._head)

    def _divide(self) -> None:
        """Norm the stream, but for weights that are in the matrix that follows."""
        torch.linalg.vector_norm(self._stream, dim=1, keepdim=True, out=self._norm)
        torch.div(self._x, self._norm, out=self._normed)

    def forget(self) -> None:
        """Begin anew: the cache is emptied."""
        self._num_read = -1

    def _begin(self) -> None:
        """Take up the cache where it is: something else has read before."""
        cache = self._cache
        self._num_read = cache.length
        padding, device = cache.padding, cache.padding.device
        self._place = torch.tensor([cache.length - 1], device=device)
        self._positions = self._place - padding
        places = torch.arange(cache.max_length, device=device)
        is_seen = (places >= padding[:, None]) & (places < cache.length)
        self._mask.copy_(torch.where(is_seen, 0.0, float("-inf"))[:, None, None])
        self._room = 0

    def _step_on(self) -> None:
        """Make room for one token of each row."""
        self._num_read = self._cache.length = self._num_read + 1
        self._place += 1
        self._positions += 1
        torch.index_select(self._table, 0, self._positions, out=self._turning)
        self._mask.index_fill_(3, self._place, 0)
        if self._num_read > self._room:
            self._room = min(self._num_read + _ROOM - 1, self._cache.max_length)
            self._seen = self._mask.view(self._rows, 1, -1)[:, :, : self._room]
            self._views = [
                (layer.cache[:, 0, : self._room].transpose(1, 2), layer.cache[:, 1, : self._room])
                for layer in self._layers
            ]


class _Layer(NamedTuple):
    """The weights of a block, as products of rows with them need them, and its keys and values."""

    heads: Tensor
    """`(C, K (G + 2) D)`: of each key head, its query heads, itself and its values."""
    output: Tensor
    """`(K G D, C)`."""
    gate_up: Tensor
    """`(C, 2 F)`."""
    down: Tensor
    """`(F, C)`."""
    cache: Tensor
    """Keys and values, `(B K, 2, M, D)`."""


def _pack(block: Any, cache: LayerCache, config: DecoderConfig, num_queries: int) -> _Layer:
    attention, feed_forward, root = block.self_attn, block.mlp, config.hidden_size**0.5
    projections = (attention.q_proj.weight, num_queries), (attention.k_proj.weight, 1), (attention.v_proj.weight, 1)
    heads = torch.cat([w.view(config.kv_heads, n * config.head_size, -1) for w, n in projections], 1).flatten(0, 1)
    gate_up = torch.cat((feed_forward.gate_proj.weight, feed_forward.up_proj.weight))
    return _Layer(
        _transposed(heads * (block.input_layernorm.weight * root)),
        _transposed(attention.o_proj.weight),
        _transposed(gate_up * (block.post_attention_layernorm.weight * root)),
        _transposed(feed_forward.down_proj.weight),
        cache.both.flatten(0, 1),
    )


def _transposed(weight: Tensor) -> Tensor:
    """Return the weight as `(in, out)` in memory: a row times it runs at the speed of memory, also by MKL on AMD."""
    return weight.t().contiguous()


def _empty(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device)
