"""Batches as loaders make them: tensors inside tuples, lists and dictionaries, as deep as one likes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor


def map_tensors(function: Callable[[Tensor], Any], batch: Any) -> Any:
    """Return the batch with `function(tensor)` in place of each tensor; whatever else it holds stays as it is."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        mapped = {key: map_tensors(function, value) for key, value in batch.items()}
        return mapped if type(batch) is dict else type(batch)(mapped)  # type: ignore[call-arg]
    if isinstance(batch, (list, tuple)):
        values = [map_tensors(function, value) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    return batch


def leaves_in(batch: Any) -> Iterator[Any]:
    """Yield all that a batch holds but its tuples, lists and dictionaries themselves, in the order of `map_tensors`."""
    if isinstance(batch, Mapping):
        for value in batch.values():
            yield from leaves_in(value)
    elif isinstance(batch, (list, tuple)):
        for value in batch:
            yield from leaves_in(value)
    else:
        yield batch


def tensors_in(batch: Any) -> Iterator[Tensor]:
    """Yield a batch's tensors, in the order of `map_tensors`."""
    return (leaf for leaf in leaves_in(batch) if isinstance(leaf, Tensor))
