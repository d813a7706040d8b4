"""Windows of a memory-mapped stream of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

IGNORED = -100
"""A target that is not predicted: cross-entropy leaves it out."""


class TokenWindows:
    """A `Dataset` of consecutive windows: sample i predicts tokens `i T + 1` to `(i + 1) T`, each token once.

    Args:
        path: tokens, without a header.
        dtype: their type.
        sequence_length: T.
    """

    reads_ahead = True

    def __init__(self, path: Path, dtype: str, sequence_length: int) -> None:
        self._given = path, dtype, sequence_length
        self._tokens = np.memmap(path, dtype=dtype, mode="r")
        self._length = sequence_length

    def __reduce__(self) -> tuple[Any, ...]:
        """Let another process map the file, too: a pickle would hold a copy of it."""
        return type(self), self._given

    def __len__(self) -> int:
        return -(-(len(self._tokens) - 1) // self._length)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return tokens and targets, int64 `(n, T)` each.

        The last window is shorter: it is filled up with tokens that do not matter, whose targets are `IGNORED`.
        """
        positions = indices.numpy()[:, None] * self._length + np.arange(self._length + 1)
        last = len(self._tokens) - 1
        tokens = torch.from_numpy(self._tokens[np.minimum(positions, last)].astype(np.int64))
        targets = tokens[:, 1:].clone()
        targets[torch.from_numpy(positions[:, 1:] > last)] = IGNORED
        return tokens[:, :-1], targets

    def num_targets(self, indices: Tensor) -> int:
        """Return the tokens that these samples predict."""
        last = len(self) - 1
        short = self._length * len(self) - (len(self._tokens) - 1)
        return len(indices) * self._length - short * int((indices == last).sum())
