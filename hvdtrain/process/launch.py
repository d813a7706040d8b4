"""Who started this process, as which rank of how many, and what must be set before torch and MPI start.

Standard library only: this runs before torch is imported.
"""

from __future__ import annotations

import ctypes
import os
import pwd
import re
import sys
import tempfile
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

from hvdtrain.process.transports import leave_out_ofi

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
DATA_WORKER = "HVDTRAIN_DATA_WORKER"
"""Environment variable of the processes that read a rank's data: names which one it is."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_YIELD = "OMPI_MCA_mpi_yield_when_idle"


@dataclass(frozen=True)
class Launch:
    """A process's place, as its launcher's environment variables tell it."""

    launcher: str
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_parallel(self) -> bool:
        """Return whether a launcher started this process, be it as the only one."""
        return self.launcher != "none"


def detect_launch(environ: Mapping[str, str] = os.environ) -> Launch:
    """Return this process's place from the environment of horovodrun, mpirun (Open MPI, MPICH, Intel MPI) or srun."""

    def number(*names: str, default: int = 0) -> int:
        return next((int(environ[name]) for name in names if environ.get(name, "").isdigit()), default)

    of_gloo = Launch(
        "horovodrun --gloo",
        number("HOROVOD_RANK"),
        number("HOROVOD_SIZE", default=1),
        number("HOROVOD_LOCAL_RANK"),
        number("HOROVOD_LOCAL_SIZE", default=1),
    )
    if "HOROVOD_RANK" in environ and "HOROVOD_GLOO_RENDEZVOUS_ADDR" in environ:
        return of_gloo
    if "OMPI_COMM_WORLD_SIZE" in environ:
        return Launch(
            "srun" if "SLURM_STEP_ID" in environ and "PMIX_RANK" not in environ else "mpirun",
            number("OMPI_COMM_WORLD_RANK"),
            number("OMPI_COMM_WORLD_SIZE", default=1),
            number("OMPI_COMM_WORLD_LOCAL_RANK"),
            number("OMPI_COMM_WORLD_LOCAL_SIZE", default=1),
        )
    # Where MPICH's and Intel MPI's mpiexec start their daemons by srun, and in a shell that `srun --pty` gave, ranks of
    # theirs have the variables of that step, too. This one is set by them alone.
    is_mpiexec = "MPI_LOCALRANKID" in environ
    if "SLURM_STEP_ID" in environ and "SLURM_PROCID" in environ and not is_mpiexec:
        return Launch(
            "srun",
            number("SLURM_PROCID"),
            number("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", default=1),
            number("SLURM_LOCALID"),
            _tasks_on_node(environ.get("SLURM_STEP_TASKS_PER_NODE", "1"), number("SLURM_NODEID")),
        )
    if "PMI_RANK" in environ:
        return Launch(
            "mpiexec",
            number("PMI_RANK"),
            number("PMI_SIZE", default=1),
            number("MPI_LOCALRANKID", "PMI_LOCAL_RANK"),
            number("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE", default=1),
        )
    if "HOROVOD_RANK" in environ:  # without what goes with it, left behind: `world.start` refuses it
        return of_gloo
    return _detect_torch_launcher(environ, number("RANK"), number("WORLD_SIZE", default=1))


def _detect_torch_launcher(environ: Mapping[str, str], rank: int, size: int) -> Launch:
    """Return the launcher of torch.distributed: `world.start` refuses it, and says which one to take instead."""
    if not ("RANK" in environ and size > 1):
        return Launch("none")
    name = "accelerate launch" if any(key.startswith("ACCELERATE_") for key in environ) else "torchrun"
    return Launch(name, rank, size)


def counts_of_nodes(tasks_per_node: str) -> list[int]:
    """Return the numbers of Slurm's compressed list: "2(x3),1" stands for 2, 2, 2, 1."""
    counts: list[int] = []
    for count, repeat in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks_per_node):
        counts += [int(count)] * int(repeat or 1)
    return counts


def _tasks_on_node(tasks_per_node: str, node: int) -> int:
    counts = counts_of_nodes(tasks_per_node)
    return counts[node] if node < len(counts) else 1


def threads_per_rank(local_size: int) -> int:
    """Return the cores that this rank may use for itself.

    A launcher that binds ranks narrows their affinity below its own: then what is left is this rank's. One that does
    not bind leaves all cores to all of its ranks, which share them equally.
    """
    mine = _affinity(0)
    launchers = _affinity(os.getppid()) or mine
    return max(1, min(len(mine), len(mine | launchers) // local_size))


def prepare_process(environ: MutableMapping[str, str] = os.environ) -> Launch:
    """Set threads and MPI's way of waiting for this process; call it before torch is imported and MPI starts.

    What the user has set is left alone. Open MPI's waiting ranks spin unless told to yield; where the ranks' threads
    fill all cores, the spinning takes the core that another rank computes on.
    """
    open_outputs()
    give_home(environ)
    launch = detect_launch(environ)
    threads = threads_per_rank(launch.local_size)
    if not any(name in environ for name in THREAD_VARIABLES):
        for name in THREAD_VARIABLES:
            environ[name] = str(threads)
    cores = len(_affinity(0) | (_affinity(os.getppid())))
    if launch.local_size * int_or(environ.get(THREAD_VARIABLES[0]), threads) >= cores:
        environ.setdefault(_YIELD, "1")
    if launch.launcher in ("mpirun", "srun"):
        leave_out_ofi(environ)
    # Gradients travel in buckets of a fixed layout; fusing them further would depend on timing (world/exchange.py).
    environ.setdefault("HOROVOD_FUSION_THRESHOLD", "0")
    if not any(name.startswith("MALLOC_") for name in environ):
        _keep_memory()
    return launch


def open_outputs() -> None:
    """Give a process that was started without a standard stream (`>&-`, some daemons) one that leads nowhere.

    Python has None there. The stream takes the free number, so that no file opened later is printed into.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115


def give_home(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set HOME where it is not (`env -i`, services, `docker run --user N`): Open MPI does not start without it.

    It is the user's own, or for one without a name a temporary folder.
    """
    if environ.get("HOME"):
        return
    try:
        home = Path(pwd.getpwuid(os.getuid()).pw_dir)
    except KeyError:
        home = Path(tempfile.gettempdir()) / f"hvdtrain-{os.getuid()}"
        home.mkdir(mode=0o700, exist_ok=True)
    environ["HOME"] = str(home)


def _keep_memory() -> None:
    """Have glibc keep up to 1 GiB that was freed: each step's activations take the places of the last one's.

    It would give them back to the system, and be handed the pages one by one, zeroed, in every step.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return
    for parameter in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
        mallopt(parameter, 2**30)


def int_or(text: str | None, default: int) -> int:
    """Return the first number of a setting such as OMP_NUM_THREADS ("4" or "4,2"), or `default`."""
    match = re.match(r"\d+", text or "")
    return int(match.group()) if match else default


def _affinity(pid: int) -> set[int]:
    try:
        return set(os.sched_getaffinity(pid))
    except (AttributeError, OSError):  # not Linux, or not our process
        return set(range(os.cpu_count() or 1)) if pid == 0 else set()
