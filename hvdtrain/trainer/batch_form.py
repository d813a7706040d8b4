"""The form of the first batch that a data set returns: tensors, with a row for each sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from hvdtrain.data.nested import leaves_in, tensors_in
from hvdtrain.data.readers import read_samples
from hvdtrain.data.stream import StreamSamples
from hvdtrain.data.users import MapSamples
from hvdtrain.errors import DataError, HvdtrainError
from hvdtrain.trainer.task import Batch, Task


def read_first(task: Task, samples: Tensor, read: Callable[[], Any]) -> Batch:
    """Return the first micro-batch of this rank, as `read` reads it.

    Args:
        task: what is trained.
        samples: indices of its samples, int64 `(n,)`.
        read: returns `task.train_data.batch(samples)`, perhaps by another thread.

    Raises:
        DataError: it holds no tensors with `n` rows each, or the samples differ in shape.
    """
    try:
        batch = read()
    except HvdtrainError:
        raise
    except (RuntimeError, ValueError) as error:
        _explain_shapes(task, samples, error)
        raise
    _check_rows(task, batch, len(samples))
    return batch


def _check_rows(task: Task, batch: Batch, num_samples: int) -> None:
    """Raise DataError where a batch holds no tensors, or its data set's own tensors have other rows than samples."""
    is_collated = isinstance(task.train_data, (MapSamples, StreamSamples))
    name = "collate" if is_collated else f"{type(task.train_data).__name__}.batch"
    tensors = list(tensors_in(batch))
    if any(isinstance(leaf, np.ndarray) for leaf in leaves_in(batch)):
        raise DataError(f"{name} returned a numpy array among its values: make it a tensor with torch.from_numpy")
    if not tensors:
        raise DataError(
            f"{name} returned a {type(batch).__name__} without tensors: return tensors, as in `return inputs, targets`,"
            " or a list or dictionary of them"
        )
    for i, tensor in enumerate([] if is_collated else tensors):  # batches of graphs, say, have rows of another kind
        if not has_rows(tensor, num_samples):
            raise DataError(
                f"{name} returned a tensor number {i} of shape {tuple(tensor.shape)} for {num_samples} samples:"
                f" its first dimension must be {num_samples}"
            )


def has_rows(tensor: Tensor, number: int) -> bool:
    """Return whether a tensor's first dimension is so long."""
    return tensor.ndim > 0 and len(tensor) == number


def _explain_shapes(task: Task, samples: Tensor, error: Exception) -> None:
    """Raise DataError where samples cannot be read together, but each alone, because their shapes differ."""
    try:
        alone = [read_samples(task.train_data, samples[i : i + 1]) for i in range(len(samples))]
        shapes = [[tuple(tensor.shape[1:]) for tensor in tensors_in(batch)] for batch in alone]
    except Exception:
        return
    other = next((i for i, shape in enumerate(shapes) if shape != shapes[0]), None)
    if other is not None:
        raise DataError(
            f"samples {int(samples[0])} and {int(samples[other])} differ in shape ({_listed(shapes[0])} and"
            f" {_listed(shapes[other])}): crop, resize or pad them in {type(task.train_data).__name__}.batch"
        ) from error


def _listed(shapes: list[tuple[int, ...]]) -> str:
    return ", ".join(map(str, shapes))
