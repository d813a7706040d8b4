"""Documents packed to full length: tokens, which of them are to be predicted, and where documents begin.

    CACHE/HASH/train.tokens, val.tokens        int32 tokens of all documents, one after the other
              /train.targets, val.targets      uint8, 1 where a token is to be predicted from those before it
              /train.starts, val.starts        int64, place of the first token of each document
              /meta.json

Sample i shows tokens `i T` to `(i + 1) T - 1` and predicts the ones after each. A document that does not fit goes on in
the next sample. The first token of a document is never predicted.
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

from hvdtrain.data.text.windows import IGNORED
from hvdtrain.errors import DataError
from hvdtrain.settings.files import locked, written_whole

FORMAT_VERSION = 2


@dataclass(frozen=True)
class TokenizedDocument:
    """The tokens of a document, or of the next part of one.

    Args:
        tokens: int64 `(n,)`.
        is_target: bool `(n,)`, whether each is to be predicted.
        is_start: the document begins here.
    """

    tokens: NDArray[np.int64]
    is_target: NDArray[np.bool_]
    is_start: bool = True


class PackedDocuments:
    """A `Dataset` of windows that hold parts of several documents; samples without anything to predict are left out.

    Args:
        folder: where `write_packed` has put it.
        name: "train" or "val".
        sequence_length: T.
    """

    reads_ahead = True

    def __init__(self, folder: Path, name: str, sequence_length: int) -> None:
        self._given = folder, name, sequence_length
        self._tokens: NDArray[np.int32] = _map(folder / f"{name}.tokens", np.int32)
        self._targets: NDArray[np.uint8] = _map(folder / f"{name}.targets", np.uint8)
        self._starts: NDArray[np.int64] = _map(folder / f"{name}.starts", np.int64)
        self._length = sequence_length
        number = -(-(len(self._tokens) - 1) // sequence_length) if len(self._tokens) > 1 else 0
        begins = np.arange(number) * sequence_length
        self._counts = np.add.reduceat(self._targets[1:], begins, dtype=np.int64) if number else begins
        self._windows = np.flatnonzero(self._counts)

    def __reduce__(self) -> tuple[Any, ...]:
        """Let another process map the files, too: a pickle would hold copies of them."""
        return type(self), self._given

    def __len__(self) -> int:
        return len(self._windows)

    @property
    def num_tokens(self) -> int:
        """Return the tokens that are predicted."""
        return int(self._counts.sum())

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return tokens, targets, documents and positions, int64 `(n, T)` each.

        Targets are `IGNORED` where there is none to predict. Documents have their numbers in the corpus, what fills the
        last window up has -1; positions count from 0 in each, or from where the window cuts it.
        """
        starts = self._windows[indices.numpy()] * self._length
        places = starts[:, None] + np.arange(self._length + 1)
        last = len(self._tokens) - 1
        inside = np.minimum(places, last)
        tokens = self._tokens[inside].astype(np.int64)
        is_target = (self._targets[inside[:, 1:]] == 1) & (places[:, 1:] <= last)
        document = np.searchsorted(self._starts, places[:, :-1], "right") - 1
        position = places[:, :-1] - np.maximum(self._starts[document], starts[:, None])
        document[places[:, :-1] > last] = -1
        targets = np.where(is_target, tokens[:, 1:], IGNORED)
        return tuple(torch.from_numpy(array) for array in (tokens[:, :-1].copy(), targets, document, position))  # type: ignore[return-value]

    def num_targets(self, indices: Tensor) -> int:
        """Return the tokens that these samples predict."""
        return int(self._counts[self._windows[indices.numpy()]].sum())


def same_document(documents: Tensor) -> Tensor:
    """Return who may see whom, bool `(n, 1, T, T)`: tokens before one's own, of the same document.

    Args:
        documents: int64 `(n, T)`.
    """
    length = documents.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=documents.device).tril()
    return ((documents[:, :, None] == documents[:, None, :]) & causal)[:, None]


def write_packed(cache: Path, digest: str, splits: Mapping[str, Callable[[], Iterable[TokenizedDocument]]]) -> Path:
    """Write documents under a hash of all that makes them, or find them there; one process of a host at a time.

    Returns:
        The folder for `PackedDocuments`.

    Raises:
        DataError: they cannot be written, or there are none.
    """
    folder = cache / f"packed-{FORMAT_VERSION}-{digest}"
    try:
        with locked(cache / f"{folder.name}.lock"):
            if not folder.exists():
                with written_whole(folder) as new:
                    largest = {name: _write_split(new, name, documents()) for name, documents in splits.items()}
                    (new / "meta.json").write_text(json.dumps({"largest_token": largest}))
    except OSError as error:
        raise DataError(
            f"prepared tokens cannot be kept in {cache} ({error.strerror or error}): free some space there, or choose"
            " another --data.cache-dir"
        ) from error
    return folder


def largest_token(folder: Path) -> int:
    """Return the largest token of all documents; -1 where there are none."""
    largest: dict[str, int] = json.loads((folder / "meta.json").read_text())["largest_token"]
    return max(largest.values())


def _write_split(folder: Path, name: str, documents: Iterable[TokenizedDocument]) -> int:
    """Write the files of a split; returns its largest token, -1 where there is none."""
    count, largest = 0, -1
    with (
        (folder / f"{name}.tokens").open("wb") as tokens,
        (folder / f"{name}.targets").open("wb") as targets,
        (folder / f"{name}.starts").open("wb") as starts,
    ):
        for document in documents:
            if len(document.tokens) == 0:
                continue
            is_target = document.is_target.astype(np.uint8)
            if document.is_start:
                is_target[0] = 0
                starts.write(np.array([count], np.int64).tobytes())
            tokens.write(document.tokens.astype(np.int32).tobytes())
            targets.write(is_target.tobytes())
            count += len(document.tokens)
            largest = max(largest, int(document.tokens.max()))
    return largest


def _map(path: Path, dtype: type) -> NDArray:  # type: ignore[type-arg]
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)
