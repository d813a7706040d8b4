"""Documents packed into samples: tokens, which of them are to be predicted, and where documents begin.

    CACHE/packed-N-HASH/train.tokens, val.tokens     int32, the tokens of all documents, one after the other
                       /train.targets, val.targets   uint8, 1 where a token is to be predicted from those before it
                       /train.documents, ...         int64 `(documents, 3)`: where each begins; 1 if it is cut where it
                                                     is too long for a sample, 0 if it goes on in another one; the
                                                     bytes of text that it predicts
                       /meta.json

A document of n tokens shows n - 1 of them and predicts the ones after each: the first is never predicted. One that is
longer than a sample fills samples of its own with all but its rest, or is cut. What is shorter is put whole into
samples, several in one, by best fit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hvdtrain.data.text.best_fit import pack_best_fit
from hvdtrain.data.text.sealed import sealed_folder
from hvdtrain.data.text.windows import IGNORED, WithStarts

FORMAT_VERSION = 3


@dataclass(frozen=True)
class TokenizedDocument:
    """The tokens of a document, or of the next part of one.

    Args:
        tokens: int64 `(n,)`.
        is_target: bool `(n,)`, whether each is to be predicted.
        is_start: the document begins here.
        is_whole: it is cut where it is too long for a sample, instead of going on in another one.
        num_bytes: those of the text that is to be predicted.
    """

    tokens: NDArray[np.int64]
    is_target: NDArray[np.bool_]
    is_start: bool = True
    is_whole: bool = False
    num_bytes: int = 0


class PackedDocuments:
    """A `Dataset` of samples that hold parts of several documents; what predicts nothing is left out.

    Args:
        folder: where `write_packed` has put it.
        name: "train" or "val".
        sequence_length: T.
    """

    reads_ahead = True

    def __init__(self, folder: Path, name: str, sequence_length: int) -> None:
        self._given = folder, name, sequence_length
        self._tokens: NDArray[np.int32] = map_file(folder / f"{name}.tokens", np.int32)
        self._targets: NDArray[np.uint8] = map_file(folder / f"{name}.targets", np.uint8)
        self._length = sequence_length
        documents: NDArray[np.int64] = map_file(folder / f"{name}.documents", np.int64).reshape(-1, 3)
        self.num_documents = len(documents)
        pieces, self.num_cut, self.num_lost, self.num_bytes = _cut(documents, self._targets, sequence_length)
        self._starts, self._lengths, self._counts = pieces
        self._samples = pack_best_fit(self._lengths, sequence_length)
        self._sample_counts = np.array([self._counts[pieces].sum() for pieces in self._samples], np.int64)

    def __reduce__(self) -> tuple[Any, ...]:
        """Let another process map the files, too: a pickle would hold copies of them."""
        return type(self), self._given

    def __len__(self) -> int:
        return len(self._samples)

    @property
    def num_tokens(self) -> int:
        """Return the tokens that are predicted."""
        return int(self._counts.sum())

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return tokens, targets, documents and positions, int64 `(n, T)` each.

        Targets are `IGNORED` where there is none to predict. Documents are numbered by pieces, what fills a sample up
        has -1 and token 0; positions count from 0 in each piece.
        """
        shape = (len(indices), self._length)
        tokens, position = np.zeros((2, *shape), np.int64)
        targets, document = np.full(shape, IGNORED, np.int64), np.full(shape, -1, np.int64)
        for row, index in enumerate(indices.tolist()):
            at = 0
            for piece in self._samples[index]:
                start, length = int(self._starts[piece]), int(self._lengths[piece])
                here, there = slice(at, at + length), slice(start + 1, start + 1 + length)
                tokens[row, here] = self._tokens[start : start + length]
                targets[row, here] = np.where(self._targets[there], self._tokens[there], IGNORED)
                document[row, here] = piece
                position[row, here] = np.arange(length)
                at += length
            position[row, at:] = np.arange(self._length - at)
        return tuple(torch.from_numpy(array) for array in (tokens, targets, document, position))  # type: ignore[return-value]

    def num_targets(self, indices: Tensor) -> int:
        """Return the tokens that these samples predict."""
        return int(self._sample_counts[indices.numpy()].sum())


class DocumentsWithStarts(WithStarts):
    """`PackedDocuments`, with where their pieces begin, and what fills a sample up."""

    def begins(self, batch: tuple[Tensor, ...]) -> Tensor:
        """Return which tokens are the first of a piece, bool `(n, T)`."""
        return begins_of(batch[2])


def begins_of(documents: Tensor) -> Tensor:
    """Return where a piece of a document begins, bool `(n, T)`, given their numbers, int64 `(n, T)`."""
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return begins


def _cut(
    documents: NDArray[np.int64], targets: NDArray[np.uint8], length: int
) -> tuple[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]], int, int, float]:
    """Return the pieces of documents that predict anything: where each begins, its length and its targets.

    Returns:
        Also how many documents are cut behind something to predict, how many before, of which nothing is left, and the
        bytes of text that the pieces predict; of what is cut, the share of its tokens.
    """
    starts, is_whole, num_bytes = documents.T
    shown = np.diff(starts, append=len(targets)) - 1
    number = np.where(is_whole == 1, np.minimum(shown, 1), -(-shown // length))
    owner = np.repeat(np.arange(len(starts)), number)
    offset = length * (np.arange(len(owner)) - np.repeat(np.cumsum(number) - number, number))
    begins, lengths = starts[owner] + offset, np.minimum(length, shown[owner] - offset)
    counts = _sums(targets, begins + 1, begins + 1 + lengths)
    of_documents = np.bincount(owner, counts, len(starts))
    of_all = _sums(targets, starts, starts + shown + 1)
    kept_bytes = float((num_bytes * of_documents / np.maximum(of_all, 1)).sum())
    kept = counts > 0
    is_lost = (of_documents == 0) & (of_all > 0)
    num_cut = int(((is_whole == 1) & (shown > length) & ~is_lost).sum())
    return (begins[kept], lengths[kept], counts[kept]), num_cut, int(is_lost.sum()), kept_bytes


def _sums(values: NDArray[np.uint8], starts: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the sums of values from each start to each end; the ranges are in order, and none is empty."""
    if not len(starts):
        return np.zeros(0, np.int64)
    bounds = np.stack((starts, ends), 1).ravel()
    if bounds[-1] == len(values):
        bounds = bounds[:-1]
    sums: NDArray[np.int64] = np.add.reduceat(values, bounds, dtype=np.int64)
    return sums[::2]


def same_document(documents: Tensor) -> Tensor:
    """Return who may see whom, bool `(n, 1, T, T)`: tokens before one's own, of the same document.

    Args:
        documents: int64 `(n, T)`.
    """
    length = documents.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=documents.device).tril()
    return ((documents[:, :, None] == documents[:, None, :]) & causal)[:, None]


def write_packed(
    cache: Path,
    digest: str,
    splits: Mapping[str, Callable[[], Iterable[TokenizedDocument]]],
    describe: Callable[[], dict[str, Any]] = dict,
    say: Callable[[str], None] = lambda text: None,
) -> Path:
    """Write documents under a hash of all that makes them, or find them there; one process of a host at a time.

    Args:
        cache: where.
        digest: the hash.
        splits: the documents by name.
        describe: returns what `read_meta` shall return, after all were read.
        say: takes that what was there was changed.

    Returns:
        The folder for `PackedDocuments`.

    Raises:
        DataError: they cannot be written, or there are none.
    """

    def write(new: Path) -> None:
        largest = [_write_split(new, name, documents()) for name, documents in splits.items()]
        meta = {"largest_token": max(largest), **describe()}
        (new / "meta.json").write_text(json.dumps(meta))

    return sealed_folder(cache, f"packed-{FORMAT_VERSION}-{digest}", write, say)


def read_meta(folder: Path) -> dict[str, Any]:
    """Return what is known of the documents: `largest_token`, -1 where there are none, and what `describe` returned."""
    meta: dict[str, Any] = json.loads((folder / "meta.json").read_text())
    return meta


def _write_split(folder: Path, name: str, documents: Iterable[TokenizedDocument]) -> int:
    """Write the files of a split; returns its largest token, -1 where there is none."""
    count, largest = 0, -1
    table: list[list[int]] = []
    with (folder / f"{name}.tokens").open("wb") as tokens, (folder / f"{name}.targets").open("wb") as targets:
        for document in documents:
            if len(document.tokens) == 0:
                continue
            is_target = document.is_target.astype(np.uint8)
            if document.is_start:
                is_target[0] = 0
                table.append([count, int(document.is_whole), 0])
            table[-1][2] += document.num_bytes
            tokens.write(document.tokens.astype(np.int32).tobytes())
            targets.write(is_target.tobytes())
            count += len(document.tokens)
            largest = max(largest, int(document.tokens.max()))
    np.array(table, np.int64).tofile(folder / f"{name}.documents")
    return largest


def map_file(path: Path, dtype: type) -> NDArray:  # type: ignore[type-arg]
    """Return a file of numbers, mapped; an empty file is no array that could be."""
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)
