"""MPI without Horovod, through mpi4py: the independent witness."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hvdtrain.world.world import World


def plain_sum(world: World, tensor: Tensor) -> Tensor | None:
    """Return the sum of `tensor` over the ranks by plain MPI, in host memory. Collective.

    None where the ranks are not MPI's (horovodrun --gloo), or mpi4py is missing or was built for another MPI.
    """
    if world.size == 1 or world.launch.launcher == "horovodrun --gloo":
        return None
    communicator = _communicator()
    is_there = communicator is not None and communicator.Get_size() == world.size
    if not all(world.all_gather_object(is_there, "plain_mpi")):
        return None
    mine = tensor.detach().cpu().contiguous()
    total = mine.clone()
    communicator.Allreduce(mine.numpy(), total.numpy())
    return total


def _communicator() -> Any:
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError):
        return None
    return MPI.COMM_WORLD
