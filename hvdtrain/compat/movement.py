"""Horovod's collectives that move tensors and objects between ranks.

Derivatives are scaled as Horovod 0.28.1 scales them: where it takes the mean over the ranks, so is it here, so that a
program trains as it did.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from hvdtrain.compat.place import check_process_set, global_process_set, world
from hvdtrain.compat.reductions import (
    Average,
    Compression,
    Compressor,
    Handle,
    detached,
    differentiable,
    into,
    scaled,
    word_of,
)
from hvdtrain.errors import UsageError


def allgather(tensor: Tensor, name: str | None = None, process_set: Any = global_process_set) -> Tensor:
    """Return the ranks' tensors joined along the first dimension, whose length may differ. Collective."""
    check_process_set(process_set)
    here, kind = world(), name and f"allgather.{name}"

    def of_own_rows(gradient: Tensor) -> Tensor:
        lengths = here.all_gather_object(len(tensor), kind and f"{kind}.lengths")
        total = here.all_reduce(gradient, "mean", kind and f"{kind}.gradient")
        return torch.split(total, lengths)[here.rank]

    return differentiable(tensor, lambda value: here.all_gather(value, kind), of_own_rows)


def allgather_async(tensor: Tensor, name: str | None = None, process_set: Any = global_process_set) -> Handle:
    """Return a handle of an `allgather`, which has been waited for. Collective."""
    return finished(allgather(detached(tensor), name, process_set))


def finished(result: Any) -> Handle:
    """Return a handle of what is known already."""
    return Handle(lambda: result)


def broadcast(tensor: Tensor, root_rank: int, name: str | None = None, process_set: Any = global_process_set) -> Tensor:
    """Return rank `root_rank`'s tensor on every rank. Collective."""
    check_process_set(process_set)
    here, kind = world(), name and f"broadcast.{name}"

    def of_root(gradient: Tensor) -> Tensor:
        total = here.all_reduce(gradient, "mean", kind and f"{kind}.gradient")
        return total if here.rank == root_rank else torch.zeros_like(total)

    return differentiable(tensor, lambda value: here.broadcast(value, kind, root_rank), of_root)


def broadcast_(
    tensor: Tensor, root_rank: int, name: str | None = None, process_set: Any = global_process_set
) -> Tensor:
    """Replace every rank's tensor by that of rank `root_rank`. Collective."""
    return cast(Tensor, broadcast_async_(tensor, root_rank, name, process_set).result())


def broadcast_async(
    tensor: Tensor, root_rank: int, name: str | None = None, process_set: Any = global_process_set
) -> Handle:
    """Return a handle of a `broadcast`, which has been waited for. Collective."""
    return finished(broadcast(detached(tensor), root_rank, name, process_set))


def broadcast_async_(
    tensor: Tensor, root_rank: int, name: str | None = None, process_set: Any = global_process_set
) -> Handle:
    """Return a handle of a `broadcast_`, whose result is written when it is waited for. Collective."""
    return into(tensor, broadcast_async(tensor, root_rank, name, process_set))


def alltoall(tensor: Tensor, splits: Any = None, name: str | None = None, process_set: Any = global_process_set) -> Any:
    """Return what every rank has for this one. Collective.

    Args:
        tensor: `(n, ...)`; part r of its rows is for rank r.
        splits: rows for each rank, `(size,)`; None: equally many.
        name: alike on all ranks.
        process_set: the global one.

    Returns:
        The rows, rank 0's first; with `splits` also how many came from each rank, `(size,)`. Then the rows of all ranks
        travel to every rank, of which it takes its own.
    """
    check_process_set(process_set)
    here, kind = world(), name and f"alltoall.{name}"
    if splits is None:
        back = kind and f"{kind}.gradient"
        return differentiable(
            tensor, lambda value: here.all_to_all(value, kind), lambda gradient: here.all_to_all(gradient, back)
        )
    detached(tensor)
    if tensor.requires_grad and torch.is_grad_enabled():
        raise UsageError("alltoall with splits has no derivative here: give equal parts, or tensor.detach()")
    counts = [int(count) for count in splits]
    if len(counts) != here.size or sum(counts) != len(tensor) or min(counts) < 0:
        raise UsageError(f"splits={counts} must be {here.size} numbers whose sum is the {len(tensor)} rows")
    everyone = here.all_gather_object(counts, kind and f"{kind}.splits")
    rows = torch.split(here.all_gather(tensor, kind), [sum(theirs) for theirs in everyone])
    mine = [torch.split(part, theirs)[here.rank] for part, theirs in zip(rows, everyone, strict=True)]
    return torch.cat(mine), torch.tensor([len(part) for part in mine], dtype=torch.int32)


def alltoall_async(
    tensor: Tensor, splits: Any = None, name: str | None = None, process_set: Any = global_process_set
) -> Handle:
    """Return a handle of an `alltoall`, which has been waited for. Collective."""
    return finished(alltoall(detached(tensor), splits, name, process_set))


def reducescatter(
    tensor: Tensor,
    name: str | None = None,
    compression: type[Compressor] = Compression.none,
    op: int = Average,
    process_set: Any = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> Tensor:
    """Return this rank's rows of the reduction over the ranks; where they do not go round, the first have one more."""
    check_process_set(process_set)
    here, word, kind = world(), word_of(op), name and f"reducescatter.{name}"
    if word not in ("mean", "sum"):
        raise UsageError("reducescatter can be asked for Sum and Average")
    each, more = divmod(len(detached(tensor)), here.size)
    lengths = [each + (rank < more) for rank in range(here.size)]

    def scatter(value: Tensor) -> Tensor:
        sent, context = compression.compress(scaled(value, prescale_factor))
        if more:
            own = torch.split(here.all_reduce(sent, word, kind), lengths)[here.rank]
        else:
            own = here.reduce_scatter(sent, word, kind)
        return scaled(compression.decompress(own, context), postscale_factor)

    def gather(gradient: Tensor) -> Tensor:
        whole = here.all_gather(gradient, kind and f"{kind}.gradient") * (prescale_factor * postscale_factor)
        return whole if word == "mean" else whole * here.size

    return differentiable(tensor, scatter, gather)


def reducescatter_async(
    tensor: Tensor,
    name: str | None = None,
    op: int = Average,
    process_set: Any = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> Handle:
    """Return a handle of a `reducescatter`, which has been waited for. Collective."""
    return finished(
        reducescatter(detached(tensor), name, Compression.none, op, process_set, prescale_factor, postscale_factor)
    )


def allgather_object(obj: Any, name: str | None = None) -> list[Any]:
    """Return every rank's object, which must pickle, in the order of the ranks. Collective."""
    return world().all_gather_object(obj, name and f"object.{name}")


def broadcast_object(
    obj: Any, root_rank: int = 0, name: str | None = None, process_set: Any = global_process_set
) -> Any:
    """Return rank `root_rank`'s object, which must pickle, on every rank. Collective."""
    check_process_set(process_set)
    return world().broadcast_object(obj, name and f"object.{name}", root_rank)


def barrier(process_set: Any = global_process_set) -> None:
    """Wait until every rank is here. Collective."""
    check_process_set(process_set)
    world().barrier()


def join(device: int = -1) -> int:
    """Give zeros to what the others reduce until every rank has come here; returns the last to come. Collective.

    They lie on the GPU of this number; -1: where the gradients of the optimizers lie, or in host memory.
    """
    here = world()
    return here.answer_with_zeros(device if device >= 0 else here.gpu_of_gradients())
