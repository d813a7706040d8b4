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
        # As plain arrays: a `memmap` takes several times as long for the same rows.
        self._parts = [np.asarray(np.memmap(shard.path, shard.dtype, "r", shard.offset)) for shard in shards]
        self._starts = np.cumsum([0, *map(len, self._parts)])
        self._last = int(self._starts[-1]) - 1  # the place of the last token
        self._length = sequence_length

    def __reduce__(self) -> tuple[Any, ...]:
        """Let another process map the files, too: a pickle would hold copies of them."""
        return type(self), self._given

    def __len__(self) -> int:
        return -(-self._last // self._length)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return tokens and targets, int64 `(n, T)` each.

        The last window is shorter: it is filled up with tokens that do not matter, whose targets are `IGNORED`.
        """
        starts = indices.numpy() * self._length
        # One look-up for all rows: a loop over them would hold the interpreter for as long as a small model's step.
        places = starts[:, None] + np.arange(self._length + 1)  # (n, T + 1)
        is_short = bool((places[:, -1] > self._last).any())
        tokens = torch.from_numpy(self._at(np.minimum(places, self._last) if is_short else places))
        targets = tokens[:, 1:].clone()
        if is_short:
            targets[torch.from_numpy(places[:, 1:] > self._last)] = IGNORED
        return tokens[:, :-1], targets

    def _at(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the tokens at these places of the stream, int64, of the same shape."""
        if len(self._parts) == 1:
            return self._parts[0][places].astype(np.int64)
        part_of = np.searchsorted(self._starts, places, "right") - 1
        tokens = np.empty(places.shape, np.int64)
        for i in np.unique(part_of):
            is_here = part_of == i
            tokens[is_here] = self._parts[i][places[is_here] - self._starts[i]]
        return tokens

    def num_targets(self, indices: Tensor) -> int:
        """Return the tokens that these samples predict."""
        short = self._length * len(self) - self._last
        return len(indices) * self._length - short * int((indices == len(self) - 1).sum())


class DocumentWindows:
    """The same, with where documents begin in each: what a kernel for documents of a batch is given.

    Args:
        windows: of which tokens.
        end_of_text: the token that ends a document; the next one begins with it.
    """

    reads_ahead = True

    def __init__(self, windows: TokenWindows, end_of_text: int) -> None:
        self._windows, self._end_of_text = windows, end_of_text

    def __len__(self) -> int:
        return len(self._windows)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return tokens and targets, int64 `(n, T)` each, and where documents begin, int32 `(n, m)`, filled up with T.

        m is a power of two, so that few lengths are met.
        """
        tokens, targets = self._windows.batch(indices)
        begins = tokens == self._end_of_text
        begins[:, 0] = True
        count = max(8, 1 << (int(begins.sum(1).max()) - 1).bit_length()) if len(tokens) else 8
        starts = torch.full((len(tokens), count), tokens.shape[1], dtype=torch.int32)
        row, place = begins.nonzero(as_tuple=True)
        number = begins.cumsum(1)[row, place] - 1
        starts[row, number] = place.to(torch.int32)
        return tokens, targets, starts

    def num_targets(self, indices: Tensor) -> int:
        """Return the tokens that these samples predict."""
        return self._windows.num_targets(indices)
