"""What a rank knows of itself and its host. No rank needs another to gather these."""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import re
import resource
import shutil
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch

import hvdtrain
from hvdtrain.errors import LaunchError
from hvdtrain.process.launch import Launch
from hvdtrain.process.stray import stray_hint
from hvdtrain.settings.paths import existing_parent
from hvdtrain.world import visible_gpus
from hvdtrain.world.inspect import HorovodBuild, horovod_build, mpi_library
from hvdtrain.world.unused_gpus import unused_gpus

_SIOCGIFADDR = 0x8915  # Linux: the address of a network interface
_SHARED_MEMORY = Path("/dev/shm")
# Settings that ranks should share. What differs by design (HOROVOD_RANK, OMPI_MCA_ess_base_vpid) and what is secret
# (HOROVOD_SECRET_KEY) stays out.
_VARIABLES = re.compile(
    r"(OMP|MKL)_NUM_THREADS$|NCCL_|GLOO_|UCX_|FI_PROVIDER$|OMPI_MCA_(btl|pml|mtl|coll|oob|mpi|opal_cuda|rmaps)_?"
    r"|HOROVOD_(CONTROLLER|CPU_OPERATIONS|FUSION_THRESHOLD|CYCLE_TIME|CACHE_CAPACITY|HIERARCHICAL_\w+|AUTOTUNE"
    r"|STALL_\w+|GLOO_TIMEOUT_SECONDS|NCCL_START_LIMIT|NUM_NCCL_STREAMS|MPI_THREADS_DISABLE|BATCH_D2D_MEMCOPIES|ELASTIC)$"
)


@dataclass(frozen=True, kw_only=True)
class RankFacts:
    """One rank. Sizes in bytes, times in seconds."""

    launcher: str
    rank: int
    size: int
    """Ranks that the launcher started."""
    local_rank: int
    local_size: int
    host: str
    host_resolves: bool
    """Whether the host's own name has an address."""
    pid: int
    versions: Mapping[str, str | None]
    """hvdtrain, python, torch, numpy, horovod, and the MPI library."""
    horovod: HorovodBuild
    mpi4py_problem: str = ""
    """Why mpi4py does not load; empty where it does, and where it is not installed."""
    horovod_size: int | None = None
    """Ranks that Horovod sees; None where it did not start."""
    stray: str = ""
    """Which variables to unset if no launcher has started this process; empty where one is seen."""
    contact_problem: str = ""
    """Why the ranks are not connected."""
    cores: tuple[int, ...]
    """Numbers of the cores that this process may run on."""
    launcher_cores: tuple[int, ...]
    """The same of the process that started it, which has not been bound to a part of them."""
    core_quota: float | None = None
    """Cores' worth of time that the container may use; None: no limit."""
    load: float
    """Processes that ran or waited for a core on this host, mean of the last minute."""
    threads: int
    """Threads that torch computes with."""
    gpus: tuple[str, ...]
    """UUID of each GPU that torch sees."""
    num_machine_gpus: int
    """NVIDIA GPUs that the kernel's driver knows of."""
    unused_gpus: str = ""
    """Which GPUs torch does not use though nobody has said so, and why."""
    torch_cuda: str | None
    """CUDA version that torch was built for."""
    variables: Mapping[str, str]
    """Environment variables that should be alike on all ranks."""
    visible_devices: str | None = None
    """CUDA_VISIBLE_DEVICES."""
    run_dir: str
    free_bytes: int
    """Free space where the run directory is, or would be made."""
    is_writable: bool
    sees_rank_0_file: bool | None = None
    """Whether a file that rank 0 wrote beside the run directory is there; None: not tried."""
    shared_memory_bytes: int | None
    """Size of /dev/shm; None: there is none."""
    shared_memory_free_bytes: int | None
    shared_memory_is_writable: bool = True
    open_files: int
    """Soft limit of open files."""
    addresses: Mapping[str, str]
    """IPv4 address of each network interface."""
    interface: str | None = None
    """Interface that leads to rank 0's host; None on that host."""
    interface_mbit: int | None = None
    """What it says of its speed, in Mbit/s."""
    clock_s: tuple[float, ...] = ()
    """Readings of the wall clock, each at the end of a barrier."""


def own_facts(launch: Launch, run_dir: Path) -> RankFacts:
    """Return what this process can see on its own."""
    build, mpi = horovod_build(), mpi_library()
    existing = existing_parent(run_dir)
    shared_memory = os.statvfs(_SHARED_MEMORY) if _SHARED_MEMORY.is_dir() else None
    return RankFacts(
        launcher=launch.launcher,
        rank=launch.rank,
        size=launch.size,
        local_rank=launch.local_rank,
        local_size=launch.local_size,
        host=socket.gethostname(),
        host_resolves=_resolves(socket.gethostname()),
        pid=os.getpid(),
        versions={
            "hvdtrain": hvdtrain.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": numpy.__version__,
            "horovod": build.version,
            "MPI": mpi.name,
        },
        horovod=build,
        mpi4py_problem=mpi.problem,
        stray=stray_hint(launch).removeprefix("; "),
        cores=cores_of(0),
        launcher_cores=tuple(sorted({*cores_of(0), *cores_of(os.getppid())})),
        core_quota=_core_quota(),
        load=os.getloadavg()[0],
        threads=torch.get_num_threads(),
        gpus=_gpus(),
        unused_gpus=unused_gpus(),
        num_machine_gpus=len(list(Path("/proc/driver/nvidia/gpus").glob("*"))),
        torch_cuda=torch.version.cuda,
        variables={name: value for name, value in sorted(os.environ.items()) if _VARIABLES.match(name)},
        visible_devices=os.environ.get("CUDA_VISIBLE_DEVICES"),
        run_dir=str(run_dir),
        free_bytes=shutil.disk_usage(existing).free,
        is_writable=os.access(existing, os.W_OK),
        shared_memory_bytes=shared_memory.f_blocks * shared_memory.f_frsize if shared_memory else None,
        shared_memory_free_bytes=shared_memory.f_bavail * shared_memory.f_frsize if shared_memory else None,
        shared_memory_is_writable=os.access(_SHARED_MEMORY, os.W_OK),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        addresses=addresses(),
    )


def _gpus() -> tuple[str, ...]:
    """Return those that torch sees; none where CUDA does not start, which another check says."""
    try:
        return visible_gpus()
    except LaunchError:
        return ()


def cores_of(pid: int) -> tuple[int, ...]:
    """Return the numbers of the cores that a process may run on; 0: this one. Empty where it is not known."""
    try:
        return tuple(sorted(os.sched_getaffinity(pid)))
    except (AttributeError, OSError):  # not Linux, or not our process
        return tuple(range(os.cpu_count() or 1)) if pid == 0 else ()


def addresses() -> dict[str, str]:
    """Return the IPv4 address of each of this host's network interfaces."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name[:15].encode()))
                found[name] = socket.inet_ntoa(answer[20:24])
    return found


def interface_towards(targets: list[str], own: Mapping[str, str]) -> str | None:
    """Return the interface by which this host would send to the first of these addresses that it has a way to."""
    for target in targets:
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((target, 9))  # sends nothing
            address = probe.getsockname()[0]
            return next((name for name, mine in own.items() if mine == address), None)
    return None


def interface_mbit(name: str | None) -> int | None:
    """Return what an interface says of its speed in Mbit/s; None where it says nothing."""
    try:
        speed = int(Path(f"/sys/class/net/{name}/speed").read_text())
    except (OSError, ValueError):
        return None
    return speed if speed > 0 else None


def _resolves(name: str) -> bool:
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        return False
    return True


def _core_quota() -> float | None:
    """Return the container's share of processor time in cores (cgroup version 2, then 1)."""
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    with contextlib.suppress(OSError, ValueError):
        quota = Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us").read_text()
        period = Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us").read_text()
        return int(quota) / int(period) if int(quota) > 0 else None
    return None
