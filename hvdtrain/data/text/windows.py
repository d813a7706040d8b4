"""Windows of a memory-mapped stream of tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
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

    def tokens(self) -> NDArray[Any]:
        """Return the tokens, mapped from the file."""
        # As a plain array: a `memmap` takes several times as long for the same rows.
        return np.asarray(np.memmap(self.path, self.dtype, "r", self.offset))


def first_tokens(shards: Sequence[Shard], most: int) -> NDArray[Any]:
    """Return the first tokens of a stream, `(n,)`, at most so many, in the files' type."""
    parts = []
    for shard in shards:
        parts.append(shard.tokens()[:most])
        most -= len(parts[-1])
    return np.concatenate(parts)


class TokenWindows:
    """A `Dataset` of consecutive windows: sample i predicts tokens `i T + 1` to `(i + 1) T`, each token once.

    Args:
        shards: files whose tokens follow each other.
        sequence_length: T.
    """

    reads_ahead = True

    def __init__(self, shards: Sequence[Shard], sequence_length: int) -> None:
        self._given = shards, sequence_length
        self._parts = [shard.tokens() for shard in shards]
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


class WithStarts(ABC):
    """Samples with where documents begin in each: what a kernel for documents of a batch is given.

    They are the same samples without that: what tells data sets apart looks at `samples`.

    Args:
        samples: the data set, whose batches begin with tokens, int64 `(n, T)`.
    """

    reads_ahead = True

    def __init__(self, samples: Any) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    @abstractmethod
    def begins(self, batch: tuple[Tensor, ...]) -> Tensor:
        """Return which tokens of a batch are the first of a document, bool `(n, T)`; the first of a sample is one."""

    def batch(self, indices: Tensor) -> tuple[Tensor, ...]:
        """Return a batch, and behind it where documents begin, int32 `(n, m)`, as `starts_of`."""
        batch = self.samples.batch(indices)
        return *batch, starts_of(self.begins(batch))

    def num_targets(self, indices: Tensor) -> int:
        """Return the tokens that these samples predict."""
        return int(self.samples.num_targets(indices))


class DocumentWindows(WithStarts):
    """Windows of a stream of documents, with where these begin.

    Args:
        windows: of which tokens.
        end_of_text: the token that ends a document; the next one begins with it.
    """

    def __init__(self, windows: Any, end_of_text: int) -> None:
        super().__init__(windows)
        self._end_of_text = end_of_text

    def begins(self, batch: tuple[Tensor, ...]) -> Tensor:
        """Return which tokens are the first of a document, bool `(n, T)`."""
        begins = batch[0] == self._end_of_text
        begins[:, 0] = True
        return begins


def starts_of(begins: Tensor) -> Tensor:
    """Return where documents begin, int32 `(n, m)`, filled up with T; m is a power of two, so that few are met.

    Args:
        begins: bool `(n, T)`, whether a document begins there.
    """
    count = max(8, 1 << (int(begins.sum(1).max()) - 1).bit_length()) if len(begins) else 8
    starts = torch.full((len(begins), count), begins.shape[1], dtype=torch.int32, device=begins.device)
    row, place = begins.nonzero(as_tuple=True)
    number = begins.cumsum(1)[row, place] - 1
    starts[row, number] = place.to(torch.int32)
    return starts
