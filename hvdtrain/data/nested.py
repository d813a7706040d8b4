"""Batches as loaders make them: tensors inside tuples, lists, dictionaries and dataclasses, as deep as one likes."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, MutableSequence
from typing import Any

from torch import Tensor


def map_tensors(function: Callable[[Tensor], Any], batch: Any) -> Any:
    """Return the batch with `function(tensor)` in place of each tensor; whatever else it holds stays as it is."""
    return map_leaves(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, batch)


def map_leaves(function: Callable[[Any], Any], batch: Any) -> Any:
    """Return the batch with `function(leaf)` in place of all that is in it; what holds them keeps its type."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return _mapping(batch, {key: map_leaves(function, value) for key, value in batch.items()})
    if isinstance(batch, (list, tuple)):
        return _sequence(batch, [map_leaves(function, value) for value in batch])
    if _is_record(batch):
        return _record(batch, {name: map_leaves(function, value) for name, value in fields_of(batch).items()})
    return function(batch)


def leaves_in(batch: Any) -> Iterator[Any]:
    """Yield all that a batch holds but what holds it, tuples, dictionaries and so on, in the order of `map_leaves`."""
    values: Iterable[Any]
    if isinstance(batch, Mapping):
        values = batch.values()
    elif isinstance(batch, (list, tuple)):
        values = batch
    else:
        values = fields_of(batch).values()
        if not _is_record(batch):
            yield batch
    for value in values:
        yield from leaves_in(value)


def tensors_in(batch: Any) -> Iterator[Tensor]:
    """Yield a batch's tensors, in the order of `map_tensors`."""
    return (leaf for leaf in leaves_in(batch) if isinstance(leaf, Tensor))


def fields_of(record: Any) -> dict[str, Any]:
    """Return the fields of a dataclass by their names; of anything else, none."""
    if not _is_record(record):
        return {}
    return {item.name: getattr(record, item.name) for item in dataclasses.fields(record) if hasattr(record, item.name)}


def _is_record(batch: Any) -> bool:
    return dataclasses.is_dataclass(batch) and not isinstance(batch, type)


def _mapping(batch: Mapping[Any, Any], values: dict[Any, Any]) -> Any:
    """Return a mapping like `batch`; of a class of its own, with what it has beside its items."""
    if type(batch) is dict:
        return values
    if not isinstance(batch, MutableMapping):
        return _made(batch, values)
    like = copy.copy(batch)
    for key, value in values.items():
        like[key] = value
    return like


def _sequence(batch: Any, values: list[Any]) -> Any:
    if type(batch) is list:
        return values
    if hasattr(batch, "_fields"):
        return type(batch)(*values)
    if not isinstance(batch, MutableSequence):
        return _made(batch, values)
    like = copy.copy(batch)
    like[:] = values
    return like


def _made(batch: Any, values: Any) -> Any:
    """Return the values in an object of the batch's class, or as they are where it is made in another way."""
    try:
        return type(batch)(values)
    except TypeError:
        return tuple.__new__(type(batch), values) if isinstance(batch, tuple) else values


def _record(batch: Any, values: Mapping[str, Any]) -> Any:
    like = copy.copy(batch)
    for name, value in values.items():
        object.__setattr__(like, name, value)  # whether it is frozen or not
    return like
