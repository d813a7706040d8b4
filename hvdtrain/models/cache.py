"""Keys and values that a decoder has computed, kept while it writes: each token is read once.

Shapes: B samples, T new tokens of a sample, K key/value heads, D channels of a head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hvdtrain.models.config import DecoderConfig

if TYPE_CHECKING:
    from hvdtrain.models.one_token import OneToken


class Cache:
    """Keys and values of the tokens that were read, for rows that are padded on the left to one length.

    Args:
        config: of the decoder.
        padding: int64 `(B,)`, tokens at the beginning of each row that are not to be seen.
        max_length: the most tokens of a row, padding included.
        like: has the type and device of keys and values.
    """

    def __init__(self, config: DecoderConfig, padding: Tensor, max_length: int, *, like: Tensor) -> None:
        self.padding = padding
        self.max_length = max_length
        self.length = 0
        self.mask: Tensor | None = None
        """Who sees whom, bool `(B, 1, T, length)`, for the tokens of the last `begin`."""
        self.one_token: OneToken | None = None
        """What reads tokens one by one, once there has been one."""
        shape = (len(padding), config.kv_heads, 2, max_length, config.head_size)
        self.layers = [LayerCache(self, shape, like) for _ in range(config.num_layers)]

    def begin(self, num_tokens: int) -> Tensor:
        """Make room for more tokens of each row and return their positions, int64 `(B, T)`, 0 for padding."""
        places = torch.arange(self.length + num_tokens, device=self.padding.device)
        new = places[self.length :]
        # A token sees the ones before it; one of the padding sees itself, since none would be no number.
        is_seen = (places <= new[:, None]) & (places >= self.padding[:, None, None])
        self.mask = (is_seen | (places == new[:, None]))[:, None]  # (B, 1, T, length)
        self.length += num_tokens
        return (new - self.padding[:, None]).clamp(min=0)


class LayerCache:
    """One layer's part of a `Cache`."""

    def __init__(self, cache: Cache, shape: tuple[int, int, int, int, int], like: Tensor) -> None:
        self._cache = cache
        self.both = torch.zeros(shape, dtype=like.dtype, device=like.device)
        """Keys and values, `(B, K, 2, max_length, D)`; numbers also where nothing was read."""
        self._keys, self._values = self.both[:, :, 0], self.both[:, :, 1]

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Take in new keys and values, `(B, K, T, D)`; return all, `(B, K, length, D)`."""
        length = self._cache.length
        start = length - keys.shape[2]
        self._keys[:, :, start:length], self._values[:, :, start:length] = keys, values
        return self._keys[:, :, :length], self._values[:, :, :length]
