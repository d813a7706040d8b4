"""Tokenised pairs on disk, written once per host, and the data set that reads them.

FOLDER/SPLIT.sources, SPLIT.targets     tokens, uint32, one text after the other
FOLDER/SPLIT.ends                       where each source and target ends, int64 (2, n)
FOLDER/val.jsonl                        the held-out pairs as text
FOLDER/meta.json                        what was counted
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hvdtrain.data.text.pairs import Pair

NOTHING = -100
"""Stands where there is no target; torch's cross entropy passes over it."""
_BATCH = 512
_BLOCK, _GOLDEN = 16, (5**0.5 - 1) / 2

_Sample = tuple[NDArray[np.uint32], NDArray[np.uint32], Pair]
"""Tokens of a source, of its target, and both as text."""


class TokenizedPairs:
    """A `Dataset` of tokenised pairs.

    Args:
        folder: as `write_pairs` has written it.
        split: train or val.
        padding: token that fills sources up.
    """

    reads_ahead = True

    def __init__(self, folder: Path, split: str, padding: int) -> None:
        self._given = (folder, split, padding)
        self._padding = padding
        self._sources, self._targets = (_map(folder / f"{split}.{part}", np.uint32) for part in ("sources", "targets"))
        ends = _map(folder / f"{split}.ends", np.int64).reshape(2, -1)
        self._ends = np.concatenate((np.zeros((2, 1), np.int64), ends), axis=1)
        self.source_lengths, self.target_lengths = np.diff(self._ends, axis=1)
        """Tokens of each sample, int64 `(n,)`."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Open the files again in a worker, instead of sending what they hold."""
        return TokenizedPairs, self._given

    def __len__(self) -> int:
        return len(self.source_lengths)

    def num_targets(self, indices: Tensor) -> int:
        """Return the tokens of the targets."""
        return int(self.target_lengths[indices.numpy()].sum())

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the samples `indices`, int64 `(n,)`.

        Returns:
            Sources, int64 `(n, S)`, filled up; what of them is text, int64 `(n, S)`, 1 or 0; and targets, int64
            `(n, T)`, filled up with `NOTHING`.
        """
        rows = indices.numpy()
        shape = [int(lengths[rows].max(initial=1)) for lengths in (self.source_lengths, self.target_lengths)]
        sources = torch.full((len(rows), shape[0]), self._padding)
        targets = torch.full((len(rows), shape[1]), NOTHING)
        is_text = torch.zeros_like(sources)
        for row, number in enumerate(rows):
            source = self._part(self._sources, self._ends[0], number)
            target = self._part(self._targets, self._ends[1], number)
            sources[row, : len(source)] = source
            is_text[row, : len(source)] = 1
            targets[row, : len(target)] = target
        return sources, is_text, targets

    @staticmethod
    def _part(tokens: NDArray[np.uint32], ends: NDArray[np.int64], number: int) -> Tensor:
        return torch.from_numpy(tokens[ends[number] : ends[number + 1]].astype(np.int64))


class FirstSamples:
    """A `Dataset` of the first samples of another."""

    reads_ahead = True

    def __init__(self, data: Any, count: int) -> None:
        self._data, self._count = data, min(count, len(data))

    def __len__(self) -> int:
        return self._count

    def num_targets(self, indices: Tensor) -> int:
        """Return the other's own count."""
        return int(self._data.num_targets(indices))

    def batch(self, indices: Tensor) -> Any:
        """Return the other's samples."""
        return self._data.batch(indices)


@dataclass
class PairWriter:
    """Tokenises pairs and writes them, leaving out what is too long.

    Args:
        encode: returns the tokens of sources and of targets, given both.
        longest: the most tokens of a source, and of a target.
    """

    encode: Callable[[Sequence[str], Sequence[str]], tuple[list[list[int]], list[list[int]]]]
    longest: tuple[int, int]
    num_too_long: dict[str, int] = field(default_factory=dict)
    """By split."""

    def write(self, folder: Path, split: str, pairs: Iterable[Pair]) -> None:
        """Write a split; the held-out one in an order in which samples of about one length are near each other."""
        self.num_too_long[split] = 0
        samples = self._tokenized(split, pairs)
        if split == "val":
            held_out = list(samples)
            order = mixed_by_length([len(source) + len(target) for source, target, _ in held_out])
            held_out = [held_out[number] for number in order]
            lines = (json.dumps(pair, ensure_ascii=False) + "\n" for _, _, pair in held_out)
            (folder / "val.jsonl").write_text("".join(lines), encoding="utf-8")
            samples = iter(held_out)
        lengths: list[tuple[int, int]] = []
        with (folder / f"{split}.sources").open("wb") as sources, (folder / f"{split}.targets").open("wb") as targets:
            for source, target, _ in samples:
                source.tofile(sources)
                target.tofile(targets)
                lengths.append((len(source), len(target)))
        ends = np.cumsum(np.asarray(lengths, np.int64).reshape(-1, 2), axis=0)
        np.ascontiguousarray(ends.T).tofile(folder / f"{split}.ends")

    def _tokenized(self, split: str, pairs: Iterable[Pair]) -> Iterator[_Sample]:
        for batch in _batches(pairs, _BATCH):
            both = self.encode([pair[0] for pair in batch], [pair[1] for pair in batch])
            for source, target, pair in zip(*both, batch, strict=True):
                if len(source) <= self.longest[0] and len(target) <= self.longest[1]:
                    yield np.asarray(source, np.uint32), np.asarray(target, np.uint32), pair
                else:
                    self.num_too_long[split] += 1


def mixed_by_length(lengths: Sequence[int]) -> list[int]:
    """Return an order in which neighbours are of about one length, and any part of it has long and short ones.

    Ranks evaluate contiguous parts: sorted by length alone, the last would have the most to do.
    """
    if not lengths:
        return []
    blocks = np.array_split(np.argsort(lengths, kind="stable"), -(-len(lengths) // _BLOCK))
    # Multiples of the golden ratio lie evenly in every stretch of them.
    places = np.argsort(np.argsort(np.arange(len(blocks)) * _GOLDEN % 1))
    return [int(number) for place in places for number in blocks[place]]


def read_held_out(folder: Path) -> list[Pair]:
    """Return the held-out pairs as texts, in the order of the data set."""
    lines = (folder / "val.jsonl").read_text(encoding="utf-8").split("\n")
    return [tuple(json.loads(line)) for line in lines if line]


def _batches(pairs: Iterable[Pair], size: int) -> Iterator[list[Pair]]:
    batch: list[Pair] = []
    for pair in pairs:
        batch.append(pair)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _map(path: Path, dtype: type) -> NDArray:  # type: ignore[type-arg]
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)
