"""What `doctor` asks of Horovod and MPI: how they were built, whether they connect, and plain MPI for comparison."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from hvdtrain.errors import LaunchError
from hvdtrain.world import connect, pick_device, visible_gpus
from hvdtrain.world.world import World


@dataclass(frozen=True, kw_only=True)
class HorovodBuild:
    """The Horovod that is installed here."""

    version: str | None = None
    """None: not installed."""
    torch: str | None = None
    """The torch that it was built against."""
    features: tuple[str, ...] = ()
    """Of MPI, Gloo, NCCL and CUDA, those it was built with; empty where it does not load."""
    problem: str = ""
    """Why it does not load."""


@dataclass(frozen=True, kw_only=True)
class MpiLibrary:
    """What mpi4py loads."""

    name: str | None = None
    """Name and version; None where mpi4py is missing or does not load."""
    problem: str = ""
    """Why it does not load; empty where it is not installed."""


@dataclass(frozen=True, kw_only=True)
class Contact:
    """What came of connecting the ranks."""

    world: World | None = None
    horovod_size: int | None = None
    """Ranks that Horovod sees; None where it did not start."""
    problem: str = ""
    """Why there is no world."""


def horovod_build() -> HorovodBuild:
    """Return how the Horovod of this environment was built; never raises."""
    spec = importlib.util.find_spec("horovod")
    if spec is None or spec.origin is None:
        return HorovodBuild()
    version, against = "unknown", None
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        version = importlib.metadata.version("horovod")
    with contextlib.suppress(OSError, ValueError):
        against = json.loads(Path(spec.origin).with_name("metadata.json").read_text()).get("pytorch")
    try:
        import horovod.torch as hvd

        asked = {"MPI": hvd.mpi_built, "Gloo": hvd.gloo_built, "NCCL": hvd.nccl_built, "CUDA": hvd.cuda_built}
        features = tuple(name for name, is_built in asked.items() if is_built())
    except Exception as error:  # whatever a broken library does at import
        return HorovodBuild(version=version, torch=against, problem=_one_line(error))
    return HorovodBuild(version=version, torch=against, features=features)


def mpi_library() -> MpiLibrary:
    """Return the MPI library that mpi4py loads, or why it loads none. Does not start MPI."""
    if importlib.util.find_spec("mpi4py") is None:
        return MpiLibrary()
    try:
        import mpi4py

        mpi4py.rc.initialize = False  # Horovod starts it, or nobody
        from mpi4py import MPI

        name = MPI.Get_library_version().replace("\0", "").split(",")[0].splitlines()[0].strip()
    except Exception as error:  # mpi4py is optional, and so is all that it may lack
        return MpiLibrary(problem=_one_line(error))
    return MpiLibrary(name=name)


def try_connect() -> Contact:
    """Start Horovod where a launcher started this process; says why where it does not. Collective.

    May wait for ever where other ranks do not start: set a time limit around it.
    """
    try:
        world = connect()
    except LaunchError as error:
        return Contact(horovod_size=_horovod_size(), problem=str(error))
    except Exception as error:  # Horovod raises what it likes
        return Contact(problem=f"Horovod does not start: {_one_line(error)}")
    return Contact(world=world, horovod_size=world.size if world.launch.is_parallel else None)


def choose_device(world: World) -> None:
    """Set `world.device` as training would, where that is possible on every rank. Collective."""
    if not world.launch.is_parallel:
        return
    host = socket.gethostname()
    seen: tuple[str, ...] = ()
    with contextlib.suppress(LaunchError):  # CUDA does not start, which is said elsewhere
        seen = visible_gpus()
    gpus = [gpus for name, gpus in world.all_gather_object((host, seen), "doctor.gpus") if name == host]
    device = torch.device("cpu")
    with contextlib.suppress(LaunchError):
        device = pick_device(gpus, world.local_rank)
    kinds = world.all_gather_object(device.type, "doctor.device")
    if set(kinds) == {"cuda"}:
        world.device = device
        torch.cuda.set_device(device)


def plain_mpi(world: World) -> Callable[[int], None] | None:
    """Return a function that all-reduces a number of bytes with plain MPI, without Horovod; None where it cannot.

    It needs mpi4py, the same ranks in MPI as in Horovod (not under `horovodrun --gloo`), and an MPI that threads may
    share. Every rank gets the same answer, from what it sees itself. The function is Collective.
    """
    if mpi_library().name is None:
        return None
    from mpi4py import MPI

    if not MPI.Is_initialized() or MPI.Query_thread() != MPI.THREAD_MULTIPLE:
        return None
    if (MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size) != (world.rank, world.size):
        return None

    def all_reduce(num_bytes: int) -> None:
        buffer = np.zeros(max(1, num_bytes // 4), dtype=np.float32)
        MPI.COMM_WORLD.Allreduce(MPI.IN_PLACE, buffer)

    return all_reduce


def _horovod_size() -> int | None:
    try:
        import horovod.torch as hvd

        return int(hvd.size())
    except Exception:  # not installed, or not started
        return None


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
