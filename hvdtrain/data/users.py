"""Users' own data: map-style data sets of torch, read sample by sample and collated into batches."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from hvdtrain.data.collating import Collate, Collating
from hvdtrain.data.dataset import Dataset, checked_sample
from hvdtrain.data.draws import Draws, kept_random_state
from hvdtrain.data.nested import map_tensors
from hvdtrain.data.own_generators import Generator, generators_in
from hvdtrain.data.stream import StreamSamples
from hvdtrain.errors import DataError, one_line
from hvdtrain.process.tracebacks import reading

# Of a tuple that is meant as (inputs, targets).
_MOST_COLUMNS = 8


class MapSamples:
    """A `Dataset` of whatever has `__getitem__` and `__len__`, such as torch's map-style data sets.

    What a sample draws by torch (on the CPU), numpy or Python, or by a generator that the data set or its transforms
    keep, is a function of (seed, epoch, sample): random transforms work as they are, alike on any number of ranks and
    workers.

    Args:
        samples: returns sample i for an index i.
        collate: makes a batch of a list of samples; None for torch's `default_collate`.
    """

    def __init__(self, samples: Any, collate: Collate | None = None) -> None:
        self.samples = samples
        self._own: tuple[Generator, ...] | None = None
        self._collate = Collating(collate)

    @property
    def collate_draws(self) -> bool:
        """Return whether the function that makes batches is known to draw random numbers."""
        return bool(self._collate.draws)

    def __len__(self) -> int:
        return len(self.samples)

    def batch(self, indices: Tensor, draws: Draws | None = None) -> Any:
        """Return the collated samples `indices`, int64 `(n,)`; with n = 0, a batch of the usual form without samples.

        Raises:
            DataError: the samples make no batch.
        """
        draws = draws or Draws(0, 0, indices)
        if len(indices) == 0:
            first = torch.zeros(1, dtype=torch.int64)
            whole = self.batch(first, Draws(draws.seed, draws.epoch, first))
            return map_tensors(_without_rows, whole)
        samples = []
        with kept_random_state():
            for i, index in enumerate(indices.tolist()):
                draws.seed_generators(i, self._generators())
                with reading(index):
                    samples.append(checked_sample(self.samples[index], index))
            return self._collated(samples, indices)

    def num_targets(self, indices: Tensor) -> int:
        """Return what the data set itself counts, by a method of this name; else one a sample."""
        count = getattr(self.samples, "num_targets", None)
        return int(count(indices)) if callable(count) else len(indices)

    def _generators(self) -> tuple[Generator, ...]:
        """Return the data set's own, looked for once in a process."""
        if self._own is None:
            self._own = generators_in((self.samples, self._collate.function))
        return self._own

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the generators: a worker has others."""
        return {**self.__dict__, "_own": None}

    def _collated(self, samples: list[Any], indices: Tensor) -> Any:
        try:
            return self._collate(samples, self._generators())
        except (TypeError, RuntimeError) as error:
            if not self._collate.is_default:
                raise
            kind = f"{type(self.samples).__module__}.{type(self.samples).__qualname__}"
            raise DataError(
                f"torch's default_collate makes no batch of the samples of {kind}"
                f" ({_odd_one(samples, indices) or one_line(error)}): give Task(collate=...), or"
                " Evaluation(collate=...) for its own data, a function that makes a batch of a list of samples, such as"
                " one that pads them"
            ) from error


def _odd_one(samples: list[Any], indices: Tensor) -> str:
    """Return which sample is of another type than the first; nothing where that is not what is wrong."""
    for index, sample in zip(indices.tolist(), samples, strict=True):
        if type(sample) is not type(samples[0]):
            kinds = type(samples[0]).__name__, type(sample).__name__
            return f"sample {int(indices[0])} is of type {kinds[0]}, sample {index} of type {kinds[1]}"
    return ""


def _without_rows(tensor: Tensor) -> Tensor:
    """Return a tensor of a batch without samples; a single number stays."""
    return tensor.index_select(0, torch.zeros(0, dtype=torch.int64)) if tensor.dim() else tensor


def as_dataset(data: Any, collate: Collate | None = None) -> Dataset:
    """Return users' data as a `Dataset`: hvdtrain's own as they are, torch's and other sequences adapted.

    Raises:
        DataError: it is nothing that can be read.
    """
    _refuse_what_only_looks_like_data(data)
    if callable(getattr(data, "batch", None)) and callable(getattr(data, "num_targets", None)):
        dataset: Dataset = data
        return dataset
    if isinstance(data, IterableDataset) or (hasattr(data, "__iter__") and not hasattr(data, "__getitem__")):
        return StreamSamples(data, collate)
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return MapSamples(data, collate)
    raise DataError(
        f"{type(data).__name__} cannot be read as data: give a map-style data set (__getitem__ and __len__), one that"
        " can be iterated, or hvdtrain's own kind (batch, num_targets and __len__)"
    )


def _refuse_what_only_looks_like_data(data: Any) -> None:
    """Raise DataError where numbers from 0 on are not what samples are found by, though it can be asked for them."""
    name = type(data).__name__
    if isinstance(data, DataLoader):
        raise DataError(
            "a DataLoader decides itself which samples a batch holds: give the data set that it reads"
            " (train_data=loader.dataset, collate=loader.collate_fn); ranks, order and workers are hvdtrain's"
        )
    if isinstance(data, type):
        raise DataError(f"the class {data.__name__} is given as data: make an object of it, {data.__name__}(...)")
    if isinstance(data, str | bytes | PurePath):
        raise DataError(
            f"{str(data)[:80]!r} is given as data: a path is not read here. Give a data set that reads it, or train"
            " text and images in files by the recipes lm, hf and resnet"
        )
    if callable(getattr(data, "keys", None)):
        raise DataError(
            f"a {name} has its parts by name, and samples are found by number: give one of its parts, such as"
            " data['train'], or a list of samples"
        )
    if isinstance(data, set | frozenset):
        raise DataError(f"a {name} has no order, and every process would see another one: give sorted(data)")
    if isinstance(data, tuple) and _are_columns(data):
        raise DataError(
            f"a tuple of {len(data)} arrays is {len(data)} samples: if each holds a value of all samples, write"
            " hvdtrain.TensorSamples(x, y), of tensors"
        )


def _are_columns(data: tuple[Any, ...]) -> bool:
    """Tell whether a tuple is a few arrays of one length, that is greater than their number."""
    if not 2 <= len(data) <= _MOST_COLUMNS:
        return False
    if not all(isinstance(item, Tensor | np.ndarray) and item.ndim for item in data):
        return False
    return len({len(item) for item in data}) == 1 and len(data[0]) > len(data)
