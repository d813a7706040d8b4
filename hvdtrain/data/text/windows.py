"""Windows of a memory-mapped stream of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

IGNORED = -100
"""A target that is not predicted: cross-entropy leaves it out."""


@dataclass(frozen=True)
class Shard:
    """A file of tokens."""

    path: Path
    dtype: str
    """uint16 or uint32."""
    offset: int = 0
    """Bytes before the first token."""


class TokenWindows:
    """A `Dataset` of consecutive windows: sample i predicts tokens `i T + 1` to `(i + 1) T`, each token once.

    Args:
        shards: files whose tokens follow each other.
        sequence_length: T.
    """

    reads_ahead = True

    def __init__(self, shards: Sequence[Shard], sequence_length: int) -> None:
        self._given = shards, sequence_length
        self._parts = [np.memmap(shard.path, shard.dtype, "r", shard.offset) for shard in shards]
        self._starts = np.cumsum([0, *map(len, self._parts)])
        self._length = sequence_length

    def __reduce__(self) -> tuple[Any, ...]:
        """Let another process map the files, too: a pickle would hold copies of them."""
        return type(self), self._given

    @property
    def _last(self) -> int:
        """Return the place of the last token."""
        return int(self._starts[-1]) - 1

    def __len__(self) -> int:
        return -(-self._last // self._length)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return tokens and targets, int64 `(n, T)` each.

        The last window is shorter: it is filled up with tokens that do not matter, whose targets are `IGNORED`.
        """
        starts = indices.numpy() * self._length
        tokens = torch.from_numpy(np.stack([self._read(int(start)) for start in starts]))
        targets = tokens[:, 1:].clone()
        positions = starts[:, None] + np.arange(1, self._length + 1)
        targets[torch.from_numpy(positions > self._last)] = IGNORED
        return tokens[:, :-1], targets

    def _read(self, start: int) -> NDArray[np.int64]:
        """Return T + 1 tokens, int64; after the end, the last one again and again."""
        stop = min(start + self._length + 1, self._last + 1)
        first, last = np.searchsorted(self._starts, (start, stop - 1), "right") - 1
        pieces = [
            self._parts[i][max(0, start - self._starts[i]) : stop - self._starts[i]] for i in range(first, last + 1)
        ]
        tokens = np.concatenate(pieces).astype(np.int64)
        return np.pad(tokens, (0, self._length + 1 - len(tokens)), mode="edge")

    def num_targets(self, indices: Tensor) -> int:
        """Return the tokens that these samples predict."""
        short = self._length * len(self) - self._last
        return len(indices) * self._length - short * int((indices == len(self) - 1).sum())
