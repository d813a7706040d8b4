"""Where this process is among the ranks, in Horovod's words, and what Horovod was built with."""

from __future__ import annotations

from typing import Any

import hvdtrain
from hvdtrain.errors import UsageError
from hvdtrain.world import World, ask_horovod

_worlds: list[World] = []
"""The one world of this process, once `init` was called."""


class ProcessSet:
    """A group of ranks. Only the one with all of them is here: `global_process_set`."""

    process_set_id = 0

    def __init__(self, ranks: Any = None) -> None:
        if ranks is not None:
            raise UsageError(
                "hvdtrain.compat.horovod has no process sets but the global one: name groups in"
                " hvdtrain.init(groups=...) and use World.all_reduce_among"
            )

    def size(self) -> int:
        """Return the number of ranks."""
        return size()

    def rank(self) -> int:
        """Return this rank."""
        return rank()

    def included(self) -> bool:
        """Return True: all ranks are in it."""
        return True


global_process_set = ProcessSet()


def check_process_set(process_set: Any) -> None:
    """Raise UsageError where a group is asked for that is not all ranks."""
    if process_set is not None and process_set is not global_process_set:
        ProcessSet(process_set)


def init(comm: Any = None, process_sets: Any = None) -> None:
    """Start the ranks, once; see `hvdtrain.init`. Collective.

    Raises:
        UsageError: groups of ranks are asked for.
        LaunchError: Horovod is missing or broken, or sees other ranks than the launcher started.
    """
    if comm or process_sets:
        ProcessSet(comm or process_sets)
    if not _worlds:
        _worlds.append(hvdtrain.init())


def shutdown() -> None:
    """Leave the world."""
    while _worlds:
        _worlds.pop().close()


def is_initialized() -> bool:
    """Return whether `init` was called."""
    return bool(_worlds)


def world() -> World:
    """Return the world; for what has no name in Horovod.

    Raises:
        UsageError: `init` was not called.
    """
    if not _worlds:
        raise UsageError("Horovod has not been initialized: call hvd.init() first")
    return _worlds[0]


def rank() -> int:
    """Return the number of this rank, from 0."""
    return world().rank


def size() -> int:
    """Return how many ranks there are."""
    return world().size


def local_rank() -> int:
    """Return the number of this rank among those of its host."""
    return world().local_rank


def local_size() -> int:
    """Return how many ranks this host has."""
    return world().local_size


def cross_rank() -> int:
    """Return the number of this host among those that have a rank with this local rank."""
    return int(ask_horovod("cross_rank")) if world().launch.is_parallel else 0


def cross_size() -> int:
    """Return how many hosts have a rank with this local rank."""
    return int(ask_horovod("cross_size")) if world().launch.is_parallel else 1


def _is_built(name: str) -> bool:
    return bool(ask_horovod(name, otherwise=False))


def mpi_built() -> bool:
    """Return whether Horovod was built with MPI."""
    return _is_built("mpi_built")


def gloo_built() -> bool:
    """Return whether Horovod was built with Gloo."""
    return _is_built("gloo_built")


def nccl_built() -> bool:
    """Return whether Horovod was built with NCCL."""
    return _is_built("nccl_built")


def cuda_built() -> bool:
    """Return whether Horovod was built with CUDA."""
    return _is_built("cuda_built")


def rocm_built() -> bool:
    """Return whether Horovod was built with ROCm."""
    return _is_built("rocm_built")


def ddl_built() -> bool:
    """Return whether Horovod was built with IBM's DDL."""
    return _is_built("ddl_built")


def ccl_built() -> bool:
    """Return whether Horovod was built with Intel's oneCCL."""
    return _is_built("ccl_built")


def mpi_enabled() -> bool:
    """Return whether the ranks speak MPI."""
    return world().launch.is_parallel and bool(ask_horovod("mpi_enabled"))


def gloo_enabled() -> bool:
    """Return whether the ranks speak Gloo."""
    return world().launch.is_parallel and bool(ask_horovod("gloo_enabled"))


def mpi_threads_supported() -> bool:
    """Return whether MPI may be called by several threads."""
    return mpi_enabled() and bool(ask_horovod("mpi_threads_supported"))


def start_timeline(file_path: str, mark_cycles: bool = False) -> None:
    """Have Horovod write what its background thread does to a file that Chrome's tracing page opens."""
    if world().launch.is_parallel:
        ask_horovod("start_timeline", file_path, mark_cycles)


def stop_timeline() -> None:
    """Close the file."""
    if world().launch.is_parallel:
        ask_horovod("stop_timeline")


def add_process_set(process_set: Any) -> ProcessSet:
    """Raise UsageError: there is the global one only."""
    return ProcessSet(process_set)


def remove_process_set(process_set: Any) -> bool:
    """Return False: the global one stays."""
    return False
