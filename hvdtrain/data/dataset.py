"""What the trainer asks of data: a number of samples, and batches of them by index."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from hvdtrain.errors import DataError

# torch has no `index_select` of numbers of these types.
_NOT_SELECTED = (torch.uint16, torch.uint32, torch.uint64)


class Dataset(Protocol):
    """Samples by index. The same on every rank; reading one never needs another rank.

    Where `batch` draws no random numbers but those of `draws`, and may be called by another thread, a class attribute
    `reads_ahead = True` beside it lets batches be read while earlier ones are computed; subclasses with a `batch` of
    their own say it again. Where it also does no more than copy rows that are in memory, `is_in_memory = True` beside
    that has a batch read when it is needed: that takes less time than to hand it over from a thread.

    Random augmentation: a method `batch(indices, draws)` also gets the batch's `hvdtrain.data.draws.Draws`, from which
    each sample draws alike on any number of ranks.
    """

    def __len__(self) -> int:
        """Return the number of samples."""
        ...

    def batch(self, indices: Tensor) -> tuple[Tensor, ...]:
        """Return the samples `indices`, int64 `(n,)`, as CPU tensors whose first dimension is `n`."""
        ...

    def num_targets(self, indices: Tensor) -> int:
        """Return how many terms the loss of these samples sums over: the tokens predicted, or one a sample."""
        ...


class TensorSamples:
    """A `Dataset` of tensors held in memory; sample i is row i of each."""

    reads_ahead = True
    is_in_memory = True

    def __init__(self, *tensors: Tensor) -> None:
        if not tensors or any(len(tensor) != len(tensors[0]) for tensor in tensors):
            raise ValueError(f"tensors of one length are needed, not {[len(tensor) for tensor in tensors]}")
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def batch(self, indices: Tensor) -> tuple[Tensor, ...]:
        """Return the rows `indices`, int64 `(n,)`, of each tensor."""
        return tuple(_rows(tensor, indices) for tensor in self.tensors)

    def num_targets(self, indices: Tensor) -> int:
        """Return one a sample."""
        return indices.numel()


def checked_sample(sample: Any, number: int) -> Any:
    """Return the sample that a data set has returned.

    Raises:
        DataError: it is None. Whoever leaves it out of a batch makes figures wrong in silence.
    """
    if sample is None:
        raise DataError(
            f"sample {number} is None: how many targets a batch has is known from its samples' numbers, so none may be"
            " left out in collate. Leave it out of the data set, or return one that the loss passes over, as by the"
            " label -100 of torch's cross entropy"
        )
    return sample


def _rows(tensor: Tensor, indices: Tensor) -> Tensor:
    """Return rows of a tensor; `index_select` takes a fraction of the time of `tensor[indices]`."""
    if tensor.ndim == 1 and tensor.dtype in _NOT_SELECTED:
        return tensor[indices]
    return tensor.index_select(0, indices)


def in_batches(indices: Tensor, batch_size: int) -> list[Tensor]:
    """Cut `indices`, `(n,)`, into batches of `batch_size`, the last one perhaps smaller; none where n is 0."""
    return [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]


def contiguous_share(num_samples: int, rank: int, size: int) -> torch.Tensor:
    """Return the indices, int64, of a rank's share of all samples; shares differ in length by at most one."""
    return torch.arange(num_samples * rank // size, num_samples * (rank + 1) // size)
