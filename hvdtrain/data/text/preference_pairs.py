"""Preferences: to one prompt an answer that was chosen and one that was rejected, as tokens.

They are kept as documents are (`packed.py`), the chosen one of a pair before the rejected one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hvdtrain.data.text.chat import Passage
from hvdtrain.data.text.corpus import Document
from hvdtrain.data.text.documents import DocumentReader
from hvdtrain.data.text.formats import recognise_pair
from hvdtrain.data.text.packed import map_file
from hvdtrain.data.text.windows import IGNORED
from hvdtrain.errors import DataError


class PreferenceReader(DocumentReader):
    """Reads preferences and has them tokenised: of each, two documents, of which the answers are learned.

    Args:
        tokenizer: of transformers.
        on_error: stop at a record that cannot be used, or skip it.
    """

    def __init__(self, tokenizer: Any, on_error: Literal["stop", "skip"]) -> None:
        super().__init__(tokenizer, "text", on_error)

    def _text(self, document: Document) -> Iterator[Passage]:
        raise DataError(f"{document.path} holds a text: preferences are records, such as lines of JSON")

    def _recognise(self, value: Any) -> tuple[str, list[Passage]]:
        name, *pair = recognise_pair(value)
        passages = [self._written(content) for content in pair]
        if any(len(written) != 1 for written in passages):
            raise DataError("the chat template leaves something out of earlier answers: let the last ones alone differ")
        whole = [dataclasses.replace(written[0], is_whole=True) for written in passages]
        if whole[0].text == whole[1].text:
            raise DataError("'chosen' and 'rejected' are the same, as the chat template writes them")
        if not all(passage.text and any(end > start for start, end in passage.spans) for passage in whole):
            raise DataError("'chosen' or 'rejected' is empty")
        return name, whole


class PreferencePairs:
    """A `Dataset` of pairs; those whose prompt leaves no room for an answer are left out.

    Args:
        folder: where `write_packed` has put what `PreferenceReader` reads.
        name: "train" or "val".
        sequence_length: T; what is longer is cut at its end.
        first: the number of the first pair, where several data sets share what is known of their pairs.
    """

    reads_ahead = True

    def __init__(self, folder: Path, name: str, sequence_length: int, first: int = 0) -> None:
        self._given = folder, name, sequence_length, first
        self._tokens: NDArray[np.int32] = map_file(folder / f"{name}.tokens", np.int32)
        self._targets: NDArray[np.uint8] = map_file(folder / f"{name}.targets", np.uint8)
        documents: NDArray[np.int64] = map_file(folder / f"{name}.documents", np.int64).reshape(-1, 3)
        starts = documents[:, 0]
        shown = np.diff(starts, append=len(self._targets)) - 1
        lengths = np.minimum(shown, sequence_length)
        before = np.concatenate((np.zeros(1, np.int64), np.cumsum(self._targets, dtype=np.int64)))
        counts = before[starts + 1 + lengths] - before[starts + 1] if len(starts) else starts
        answers = counts.reshape(-1, 2)
        is_kept = (answers > 0).sum(1) == 2
        is_cut = (shown > sequence_length).reshape(-1, 2).sum(1) > 0
        is_alike = self._alike(starts.reshape(-1, 2), lengths.reshape(-1, 2), is_cut & is_kept)
        is_kept &= ~is_alike
        self._starts, self._lengths = starts.reshape(-1, 2)[is_kept], lengths.reshape(-1, 2)[is_kept]
        self._first = first
        self.num_alike = int(is_alike.sum())
        """Pairs whose answers differ only behind where they are cut."""
        self.num_left_out = int((~is_kept).sum()) - self.num_alike
        """Pairs whose prompt leaves no room for an answer."""
        self.num_cut = int((is_cut & is_kept).sum())
        """Pairs of which an answer is cut."""
        self.width = int(self._lengths.max(initial=0))
        """Tokens of the longest row."""
        self.num_tokens = int(answers[is_kept].sum())
        """Tokens of all answers."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Let another process map the files, too: a pickle would hold copies of them."""
        return type(self), self._given

    def _alike(
        self, starts: NDArray[np.int64], lengths: NDArray[np.int64], asked: NDArray[np.bool_]
    ) -> NDArray[np.bool_]:
        """Return which of the pairs asked for have two answers that are the same as far as they are read, bool `(n,)`.

        Args:
            starts: int64 `(n, 2)`, where the documents begin.
            lengths: int64 `(n, 2)`, how many tokens of each are shown; one more is predicted.
            asked: bool `(n,)`.
        """
        found = np.zeros(len(asked), bool)
        for i in asked.nonzero()[0]:
            one, other = (self._tokens[a : a + n + 1] for a, n in zip(starts[i], lengths[i], strict=True))
            found[i] = np.array_equal(one, other)
        return found

    def __len__(self) -> int:
        return len(self._starts)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return tokens and targets, int64 `(n, 2, width)`, the chosen answer first, and the pairs' numbers, `(n,)`.

        Targets are `IGNORED` but for the answers; behind its end a row has token 0.
        """
        tokens = np.zeros((len(indices), 2, self.width), np.int64)
        targets = np.full(tokens.shape, IGNORED, np.int64)
        for row, index in enumerate(indices.tolist()):
            for which in (0, 1):
                start, length = int(self._starts[index, which]), int(self._lengths[index, which])
                there = slice(start + 1, start + 1 + length)
                tokens[row, which, :length] = self._tokens[start : start + length]
                targets[row, which, :length] = np.where(self._targets[there], self._tokens[there], IGNORED)
        return torch.from_numpy(tokens), torch.from_numpy(targets), indices + self._first

    def num_targets(self, indices: Tensor) -> int:
        """Return one a pair."""
        return len(indices)
