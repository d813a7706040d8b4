"""Starting the ranks."""

from __future__ import annotations

import contextlib
import importlib.util
import multiprocessing
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from hvdtrain.errors import LaunchError, one_line
from hvdtrain.install.clone import setup_command
from hvdtrain.optim.private_optimizer import postpone_compiler
from hvdtrain.process.launch import DATA_WORKER, THREAD_VARIABLES, Launch, detect_launch, prepare_process
from hvdtrain.process.stop import end_without_launcher
from hvdtrain.process.stray import set_before_gloo, stray_hint
from hvdtrain.world.first_contact import contact_gpus
from hvdtrain.world.solo import SoloWorld
from hvdtrain.world.unused_gpus import unused_gpus
from hvdtrain.world.world import World


class UnlikeHostsError(LaunchError):
    """Some hosts have GPUs and others none.

    No wrong command: without the hosts whose GPUs are gone, which `supervise` leaves out, the same one may train.
    """

    exit_code = 1


def init(groups: Callable[[Launch], Sequence[tuple[int, ...]]] = lambda launch: ()) -> World:
    """Return the world that this process's launcher made: `SoloWorld` without one, else `HorovodWorld`. Collective.

    Sets the number of threads, one GPU per rank, and what MPI needs before it starts. `groups` names the groups of
    ranks that shall be able to reduce among themselves, each smaller than the world.

    Raises:
        LaunchError: Horovod is missing or broken, sees other ranks than the launcher, or is not built for the ranks'
            GPUs; ranks outnumber GPUs; CUDA or NCCL does not start.
    """
    world = connect(groups)
    if not world.launch.is_parallel:
        return world
    seen = world.together(visible_gpus, "visible")
    everyone = world.all_gather_object((socket.gethostname(), seen, unused_gpus()), "gpus")
    world.device = world.together(lambda: _own_device(world, everyone), "device")
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
        if world.size > 1:
            contact_gpus(world)
    return world


def connect(groups: Callable[[Launch], Sequence[tuple[int, ...]]] = lambda launch: ()) -> World:
    """Return the world before its ranks have agreed on devices; `init` is what training calls. Collective.

    Raises:
        LaunchError: Horovod is missing or broken, or sees other ranks than the launcher.
    """
    if DATA_WORKER in os.environ:
        raise LaunchError(
            f"{os.environ[DATA_WORKER]} runs this program to find its data set: write what begins training under"
            ' `if __name__ == "__main__":`'
        )
    _check_is_no_child()
    is_new = not any(name in os.environ for name in THREAD_VARIABLES)
    launch = prepare_process()
    postpone_compiler()
    end_without_launcher()
    if is_new:  # torch was imported before the variables were set: a program of the user's own
        torch.set_num_threads(int(os.environ[THREAD_VARIABLES[0]]))
    check_launcher(launch)
    is_without_horovod = launch.size == 1 and importlib.util.find_spec("horovod") is None  # in srun --pty, say
    if not launch.is_parallel or is_without_horovod:
        return SoloWorld(solo_device(), launch)
    if launch.launcher == "horovodrun --gloo":
        _check_host_name()
    check_controller(launch)
    return _start_horovod(launch, groups(launch))


def _check_is_no_child() -> None:
    """Raise LaunchError in a process that a rank has started, such as a DataLoader's worker: it is no rank itself.

    MPI and Horovod would take it for the rank whose environment, or whose memory, it has: they crash or hang.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # as multiprocessing itself asks
        raise LaunchError(
            "a process that multiprocessing has started, such as a DataLoader's worker, runs this program to find what"
            ' it is to do: write what begins training under `if __name__ == "__main__":`'
        )
    worker = torch.utils.data.get_worker_info()
    who = "a process that a rank has started" if worker is None else f"worker {worker.id} of a DataLoader"
    if worker is not None or (multiprocessing.parent_process() is not None and _is_rank(os.getppid())):
        raise LaunchError(
            f"{who} is no rank, and cannot call init(): call it in the rank, and give the data set what it needs of"
            " the world, such as rank and size"
        )


def _is_rank(pid: int) -> bool:
    """Tell whether a launcher has started a process, by the environment that it was started with."""
    try:
        raw = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:  # not Linux, or not our process
        return False
    entries = (entry.partition(b"=") for entry in raw.split(b"\0"))
    return detect_launch({os.fsdecode(name): os.fsdecode(value) for name, _, value in entries}).is_parallel


def _start_horovod(launch: Launch, groups: Sequence[tuple[int, ...]]) -> World:
    if importlib.util.find_spec("horovod") is None:
        raise LaunchError(
            f"{launch.launcher} started {launch.size} ranks, but Horovod is not installed here: run {setup_command()}"
            f"{stray_hint(launch)}"
        )
    try:
        from hvdtrain.world import horovod
    except ImportError as error:
        raise LaunchError(
            f"Horovod does not load ({error}): run {setup_command()} to build it for this torch and MPI"
        ) from error
    return horovod.start(launch, groups)


def _check_host_name() -> None:
    """Raise LaunchError where the host cannot find itself: Gloo would end in a segmentation fault."""
    name = socket.gethostname()
    try:
        socket.getaddrinfo(name, None)
    except OSError as error:
        raise LaunchError(
            f"this host's own name '{name}' has no address: add '127.0.1.1 {name}' to /etc/hosts"
        ) from error


def check_launcher(launch: Launch) -> None:
    """Raise LaunchError under the launchers of torch.distributed: each process would train for itself."""
    if launch.launcher in ("torchrun", "accelerate launch"):
        raise LaunchError(
            f"{launch.launcher} (RANK={launch.rank}, WORLD_SIZE={launch.size}) does not start Horovod's ranks: use"
            f" horovodrun -np {launch.size} python -m hvdtrain ... instead (mpirun and srun do as well); if no launcher"
            " is meant, unset RANK and WORLD_SIZE"
        )


def check_controller(launch: Launch) -> None:
    """Raise LaunchError where Horovod is told another launcher than there is.

    Under MPI's each rank would be alone; under none, Gloo would wait for others and crash.
    """
    if launch.launcher == "horovodrun --gloo" and "HOROVOD_GLOO_RENDEZVOUS_ADDR" not in os.environ:
        raise LaunchError(
            "HOROVOD_RANK is set, but no horovodrun --gloo has started this process: unset HOROVOD_RANK HOROVOD_SIZE"
            " HOROVOD_CONTROLLER, which were left by hand or by another job"
        )
    if before := set_before_gloo(launch):
        raise LaunchError(
            f"{before} was set already where horovodrun --gloo was started, which then gives it to all ranks alike:"
            f" unset {before} there"
        )
    for name in ("HOROVOD_CONTROLLER", "HOROVOD_CPU_OPERATIONS"):
        if launch.launcher == "mpirun" and os.environ.get(name, "").lower() == "gloo":
            raise LaunchError(
                f"{name}=gloo under {launch.launcher}: Horovod would see one rank instead of {launch.size}. Unset"
                f" {name}, or start with horovodrun --gloo"
            )


def solo_device() -> torch.device:
    """Return the device of a process alone: the CPU, or the current GPU.

    That is GPU 0, unless a program has chosen another one by `torch.cuda.set_device`.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    with _starting_cuda():
        return torch.device("cuda", torch.cuda.current_device())


def _own_device(world: World, everyone: Sequence[tuple[str, tuple[str, ...], str]]) -> torch.device:
    """Return this rank's device, given each rank's host, the GPUs that it sees, and those that it does not use."""
    _check_hosts_alike(everyone)
    host = socket.gethostname()
    device = pick_device([gpus for name, gpus, _ in everyone if name == host], world.local_rank)
    if world.size > 1 and device.type == "cuda" and not world.built_with & {"nccl", "cuda", "rocm"}:
        raise LaunchError(
            f"Horovod is built for CPUs on {socket.gethostname()}, and its ranks have GPUs: run {setup_command()} with"
            " the CUDA toolkit on PATH and a CUDA torch, or train on the CPU with CUDA_VISIBLE_DEVICES= (empty)"
        )
    return device


def _check_hosts_alike(everyone: Sequence[tuple[str, tuple[str, ...], str]]) -> None:
    """Raise UnlikeHostsError where some hosts have GPUs and others none: they would wait for each other for ever."""
    with_gpus = {host for host, gpus, _ in everyone if gpus}
    without = {host: unused for host, _, unused in everyone if host not in with_gpus}
    if with_gpus and without:
        host, unused = next(((host, unused) for host, unused in without.items() if unused), next(iter(without.items())))
        more = f" and {len(without) - 1} more" if len(without) > 1 else ""
        raise UnlikeHostsError(
            f"ranks on {min(with_gpus)} train on GPUs, and torch uses none on {host}{more}"
            f"{f' ({unused})' if unused else ''}: leave those hosts out, or train on the CPUs of all with"
            " CUDA_VISIBLE_DEVICES= (empty)"
        )


def visible_gpus() -> tuple[str, ...]:
    """Return the identity of each GPU that this rank sees.

    Raises:
        LaunchError: there are some, and CUDA does not start.
    """
    if not torch.cuda.is_available():
        return ()
    with _starting_cuda():
        return tuple(str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count()))


@contextlib.contextmanager
def _starting_cuda() -> Iterator[None]:
    """Within, CUDA that does not start, as on a card that another process has for itself, is a LaunchError."""
    try:
        yield
    except RuntimeError as error:
        raise LaunchError(
            f"CUDA does not start on {socket.gethostname()} ({one_line(error)}): nvidia-smi shows"
            " whether the cards are well and who uses them; CUDA_VISIBLE_DEVICES= (empty) trains on the CPU"
        ) from error


def pick_device(gpus_of_ranks: Sequence[tuple[str, ...]], local_rank: int) -> torch.device:
    """Return the device of rank `local_rank` of a host, given the GPUs that each of the host's ranks sees.

    Each rank is given a GPU of its own, told apart by their identities: what a rank calls its first GPU may be another
    one's second. A rank takes the first that it sees and nobody before it has taken; where one would go without, those
    before it give way.

    Raises:
        LaunchError: two ranks would share a GPU, or only some ranks see one.
    """
    if not any(gpus_of_ranks):
        return torch.device("cpu")
    owners: dict[str, int] = {}
    for rank in range(len(gpus_of_ranks)):
        if not _finds_gpu(rank, gpus_of_ranks, owners, set()):
            raise LaunchError(_too_few_gpus(gpus_of_ranks))
    mine = next(gpu for gpu, rank in owners.items() if rank == local_rank)
    return torch.device("cuda", gpus_of_ranks[local_rank].index(mine))


def _finds_gpu(rank: int, seen: Sequence[tuple[str, ...]], owners: dict[str, int], asked: set[str]) -> bool:
    """Give a rank a GPU, if need be one whose owner finds another (an augmenting path); returns whether it has one."""
    free = [gpu for gpu in seen[rank] if gpu not in owners]
    if free:
        owners[free[0]] = rank
        return True
    for gpu in seen[rank]:
        if gpu not in asked:
            asked.add(gpu)
            if _finds_gpu(owners[gpu], seen, owners, asked):
                owners[gpu] = rank
                return True
    return False


def _too_few_gpus(gpus_of_ranks: Sequence[tuple[str, ...]]) -> str:
    fewest = min(map(len, gpus_of_ranks))
    distinct = len({gpu for gpus in gpus_of_ranks for gpu in gpus})
    what = f"a rank there sees {fewest} GPUs" if fewest < len(gpus_of_ranks) else ""
    return (
        f"{len(gpus_of_ranks)} ranks on host {socket.gethostname()}, but {what and what + ', and '}together they see"
        f" {distinct} different ones: start one rank per GPU, or train on the CPU with CUDA_VISIBLE_DEVICES= (empty)"
    )
