"""Horovod's collectives of several tensors at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor

from hvdtrain.compat.movement import allgather, finished, reducescatter
from hvdtrain.compat.place import global_process_set
from hvdtrain.compat.reductions import (
    Average,
    Compression,
    Compressor,
    Handle,
    allreduce,
    allreduce_async,
    allreduce_async_,
    detached,
)


def _each_named(tensors: Sequence[Tensor], name: str | None) -> list[tuple[Tensor, str | None]]:
    return [(tensor, name and f"{name}.{place}") for place, tensor in enumerate(tensors)]


def grouped_allreduce(
    tensors: Sequence[Tensor],
    average: bool | None = None,
    name: str | None = None,
    compression: type[Compressor] = Compression.none,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: Any = global_process_set,
) -> list[Tensor]:
    """Return the reduction of each tensor. Collective."""
    more = (prescale_factor, postscale_factor, process_set)
    return [allreduce(tensor, average, part, compression, op, *more) for tensor, part in _each_named(tensors, name)]


def grouped_allreduce_async(
    tensors: Sequence[Tensor],
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: Any = global_process_set,
) -> Handle:
    """Begin to reduce each tensor; the result is a list. Collective."""
    more = (prescale_factor, postscale_factor, process_set)
    handles = [allreduce_async(tensor, average, part, op, *more) for tensor, part in _each_named(tensors, name)]
    return Handle(lambda: [handle.result() for handle in handles])


def grouped_allreduce_async_(
    tensors: Sequence[Tensor],
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: Any = global_process_set,
) -> Handle:
    """Begin to reduce each tensor in its place; the result is a list. Collective."""
    more = (prescale_factor, postscale_factor, process_set)
    handles = [allreduce_async_(tensor, average, part, op, *more) for tensor, part in _each_named(tensors, name)]
    return Handle(lambda: [handle.result() for handle in handles])


def grouped_allreduce_(
    tensors: Sequence[Tensor],
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: Any = global_process_set,
) -> list[Tensor]:
    """Replace each tensor by its reduction. Collective."""
    handle = grouped_allreduce_async_(tensors, average, name, op, prescale_factor, postscale_factor, process_set)
    return cast("list[Tensor]", handle.result())


def grouped_allgather(
    tensors: Sequence[Tensor], name: str | None = None, process_set: Any = global_process_set
) -> list[Tensor]:
    """Return each tensor's `allgather`. Collective."""
    return [allgather(tensor, part, process_set) for tensor, part in _each_named(tensors, name)]


def grouped_allgather_async(
    tensors: Sequence[Tensor], name: str | None = None, process_set: Any = global_process_set
) -> Handle:
    """Return a handle of a `grouped_allgather`, which has been waited for. Collective."""
    return finished(grouped_allgather([detached(tensor) for tensor in tensors], name, process_set))


def grouped_reducescatter(
    tensors: Sequence[Tensor],
    name: str | None = None,
    compression: type[Compressor] = Compression.none,
    op: int = Average,
    process_set: Any = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> list[Tensor]:
    """Return each tensor's `reducescatter`. Collective."""
    more = (compression, op, process_set, prescale_factor, postscale_factor)
    return [reducescatter(tensor, part, *more) for tensor, part in _each_named(tensors, name)]


def grouped_reducescatter_async(
    tensors: Sequence[Tensor],
    name: str | None = None,
    op: int = Average,
    process_set: Any = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> Handle:
    """Return a handle of a `grouped_reducescatter`, which has been waited for. Collective."""
    more = (op, process_set, prescale_factor, postscale_factor)
    parts = _each_named([detached(tensor) for tensor in tensors], name)
    return finished([reducescatter(tensor, part, Compression.none, *more) for tensor, part in parts])
