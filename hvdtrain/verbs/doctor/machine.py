"""Checks of each host: cores, GPUs, memory that processes share, files, disk. Pure functions from facts to findings."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import torch

from hvdtrain.errors import LaunchError, counted, listed
from hvdtrain.install.clone import setup_command
from hvdtrain.verbs.doctor.facts import RankFacts
from hvdtrain.verbs.doctor.findings import Finding, error, ok, warning
from hvdtrain.verbs.kit import ranks_text
from hvdtrain.world import pick_device

GIB = 2**30
MIB = 2**20
_SHARED_MEMORY_BYTES = 256 * MIB
_SHARED_MEMORY_BYTES_A_RANK = 32 * MIB
_FREE_SHARED_MEMORY_BYTES_A_RANK = 8 * MIB
_BUSY = 1.5
_DISK_WARNING_BYTES = 10 * GIB
_DISK_ERROR_BYTES = GIB // 2


def by_host(ranks: Sequence[RankFacts]) -> dict[str, list[RankFacts]]:
    """Return each host's ranks, hosts in the order of their first rank."""
    hosts: dict[str, list[RankFacts]] = {}
    for facts in ranks:
        hosts.setdefault(facts.host, []).append(facts)
    return hosts


def _merged(ranks: Sequence[RankFacts], check: Callable[[Sequence[RankFacts]], Iterator[Finding]]) -> Iterator[Finding]:
    """Check each host; what is alike on several is one line, and what is ok is said only where nothing is wrong."""
    hosts: dict[Finding, list[str]] = {}
    for host, own in by_host(ranks).items():
        for finding in check(own):
            hosts.setdefault(finding, []).append(host)
    wrong = [finding for finding in hosts if finding.status != "ok"]
    for finding in wrong or hosts:
        names = hosts[finding]
        yield dataclasses.replace(finding, figure=f"{listed(names, most=4)}: {finding.figure}")


def check_cores(ranks: Sequence[RankFacts]) -> Iterator[Finding]:
    """Two ranks pinned to one core, more ranks or threads than cores, cores that nobody may use."""
    yield from _merged(ranks, _cores_of_host)


def _cores_of_host(own: Sequence[RankFacts]) -> Iterator[Finding]:
    host_cores = {core for facts in own for core in facts.launcher_cores}
    usable = {core for facts in own for core in facts.cores}
    pinned = _crowded(own, len(host_cores))
    threads = sum(facts.threads for facts in own)
    room = min(len(usable), own[0].core_quota or len(usable))
    figure = f"{counted(len(own), 'rank')} with {counted(own[0].threads, 'thread')} each on {counted(room, 'core')}"
    fewer = max(1, int(room / len(own)))
    if pinned:
        who, cores = pinned
        yield error(
            "cores",
            f"{ranks_text(who)} are pinned to core {', '.join(map(str, cores))}, of {len(host_cores)} cores",
            _unbind(own[0].launcher),
        )
    elif len(own) > room:
        yield warning("cores", f"{figure}: they wait for each other", f"start {int(room) or 1} ranks on this host")
    elif threads > room:
        yield warning("cores", f"{figure}: oversubscribed", f"export OMP_NUM_THREADS={fewer} MKL_NUM_THREADS={fewer}")
    elif len(usable) < len(host_cores) and len(own) == own[0].local_size:  # else the others' cores are not known
        idle = len(host_cores) - len(usable)
        yield warning(
            "cores", f"{figure}, of {len(host_cores)}: {idle} may be used by no rank", _unbind(own[0].launcher)
        )
    else:
        yield ok("cores", figure)


def is_busy(own: Sequence[RankFacts]) -> bool:
    """Return whether others use these ranks' host: each figure of it is then too low."""
    return own[0].load > max(1.0, _BUSY * len(own[0].launcher_cores))


def check_load(ranks: Sequence[RankFacts]) -> Iterator[Finding]:
    """Other programs on a host take the cores of its ranks, and all ranks wait for the slowest."""
    if any(is_busy(own) for own in by_host(ranks).values()):
        yield from _merged(ranks, _load_of_host)


def _load_of_host(own: Sequence[RankFacts]) -> Iterator[Finding]:
    if is_busy(own):
        figure = f"{own[0].load:.1f} processes for {counted(len(own[0].launcher_cores), 'core')} in the last minute"
        yield warning("load", f"{figure}: what is measured here is too low", "top: what else runs there? Then again")


def _crowded(own: Sequence[RankFacts], num_host_cores: int) -> tuple[list[int], tuple[int, ...]] | None:
    """Return ranks that are bound to fewer cores than they are, where the host has more; and those cores."""
    for cores in sorted({facts.cores for facts in own}, key=len):
        inside = [facts.rank for facts in own if set(facts.cores) <= set(cores)]
        if len(cores) < min(len(inside), num_host_cores):
            return inside, cores
    return None


def _unbind(launcher: str) -> str:
    if launcher == "srun":
        return "srun --cpu-bind=cores --cpus-per-task=N (and export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK)"
    if launcher == "mpirun":
        return "mpirun --bind-to none ..., or leave out what pins them (taskset, a rankfile)"
    return "leave out what pins them (taskset, numactl, a cpuset)"


def check_gpus(ranks: Sequence[RankFacts]) -> Iterator[Finding]:
    """Each rank a GPU of its own, by UUID; peers visible; NCCL there."""
    if not any(facts.gpus or facts.num_machine_gpus for facts in ranks):
        others = [facts.unused_gpus for facts in ranks if facts.unused_gpus]
        if others:
            figure = f"trains on the CPU, with GPUs {others[0]}"
            yield warning("GPUs", figure, "CUDA_VISIBLE_DEVICES= (empty) says that it is meant")
        else:
            yield ok("GPUs", "none: trains on the CPU")
        return
    yield from _merged(ranks, _gpus_of_host)
    hosts = by_host(ranks)
    bare = [host for host, own in hosts.items() if not any(facts.gpus for facts in own)]
    if 0 < len(bare) < len(hosts):
        having = next(host for host in hosts if host not in bare)
        yield error(
            "GPUs",
            f"torch uses none on {listed(bare, most=4)}, and some on {having}: training refuses such hosts together",
            "leave some out, or train on the CPUs of all with CUDA_VISIBLE_DEVICES= (empty)",
        )
    lacking = [
        facts for facts in ranks if facts.gpus and facts.horovod.version and "NCCL" not in facts.horovod.features
    ]
    if lacking and len(ranks) > 1 and not lacking[0].horovod.problem:
        yield error(
            "NCCL",
            f"Horovod was built with {', '.join(lacking[0].horovod.features)}, without NCCL, and the ranks have GPUs",
            "with the CUDA toolkit on PATH and a CUDA torch:"
            f" {setup_command()} (builds with HOROVOD_GPU_OPERATIONS=NCCL)",
        )


def _gpus_of_host(own: Sequence[RankFacts]) -> Iterator[Finding]:
    machine = own[0].num_machine_gpus
    blind = [facts.rank for facts in own if not facts.gpus]
    if blind:
        yield _blind(own, blind)
        return
    taken = [_gpu_of(own, facts) for facts in own]
    missing = [facts.rank for facts, gpu in zip(own, taken, strict=True) if gpu is None]
    twice = [gpu for gpu, count in Counter(taken).items() if gpu and count > 1]
    for gpu in twice:
        who = [facts.rank for facts, mine in zip(own, taken, strict=True) if mine == gpu]
        yield error("GPUs", f"{ranks_text(who)} share GPU {gpu}", _one_rank_a_gpu(own))
    if missing:
        yield error(
            "GPUs",
            f"{len(own)} ranks, but {len({gpu for facts in own for gpu in facts.gpus})} GPUs are visible",
            _one_rank_a_gpu(own),
        )
    if twice or missing:
        return
    if len(own) > 1 and all(len(facts.gpus) == 1 for facts in own):
        yield warning(
            "GPUs",
            "each rank sees its own GPU only: NCCL may not reach the others directly (NVLink, peer to peer)",
            "srun --gpus-per-node instead of --gpus-per-task; do not set CUDA_VISIBLE_DEVICES for each rank",
        )
    idle = machine - len(own)
    rest = f"; {idle} of {machine} GPUs are left over" if idle > 0 else ""
    yield ok("GPUs", f"{'each of ' * (len(own) > 1)}{counted(len(own), 'rank')} has its own{rest}")


def _gpu_of(own: Sequence[RankFacts], facts: RankFacts) -> str | None:
    """Return the UUID of the GPU that training would give this rank; None where there is none left."""
    try:
        device = pick_device([item.gpus for item in own], facts.local_rank)
    except LaunchError:  # then name those that would share: by local rank, or the only one
        index = 0 if len(facts.gpus) == 1 and _are_alone(own) else facts.local_rank
    else:
        index = device.index if device.type == torch.device("cuda").type else 0
    return facts.gpus[index] if index < len(facts.gpus) else None


def _are_alone(own: Sequence[RankFacts]) -> bool:
    return all(len(facts.gpus) == 1 for facts in own)


def _blind(own: Sequence[RankFacts], blind: list[int]) -> Finding:
    facts = next(item for item in own if item.rank in blind)
    machine = f" of {facts.num_machine_gpus}" if facts.num_machine_gpus else ""
    figure = f"no GPU{machine} is visible to {ranks_text(blind)}"
    # Training refuses a host where only some ranks have one; where none has, it uses the CPU.
    status = warning if len(blind) == len(own) else error
    if facts.torch_cuda is None:
        return status(
            "GPUs",
            f"{figure}: torch is built for the CPU",
            f"{setup_command()} in a new environment: with a CUDA torch",
        )
    if facts.visible_devices is not None:
        return status("GPUs", f"{figure}: CUDA_VISIBLE_DEVICES={facts.visible_devices}", "unset CUDA_VISIBLE_DEVICES")
    return status("GPUs", f"{figure}: CUDA {facts.torch_cuda} does not start", "nvidia-smi: is the driver new enough?")


def _one_rank_a_gpu(own: Sequence[RankFacts]) -> str:
    num_gpus = max(own[0].num_machine_gpus, len({gpu for facts in own for gpu in facts.gpus}))
    hidden = "unset CUDA_VISIBLE_DEVICES, and " if own[0].visible_devices is not None else ""
    return f"{hidden}start one rank per GPU: -np {num_gpus} on this host"


def check_shared_memory(ranks: Sequence[RankFacts]) -> Iterator[Finding]:
    """MPI, NCCL and data loading pass data through /dev/shm; containers have 64 MiB unless told otherwise."""
    yield from _merged(ranks, _shared_memory_of_host)


def _shared_memory_of_host(own: Sequence[RankFacts]) -> Iterator[Finding]:
    size, free = own[0].shared_memory_bytes, own[0].shared_memory_free_bytes
    needed = max(_SHARED_MEMORY_BYTES, _SHARED_MEMORY_BYTES_A_RANK * len(own))
    remedy = "docker run --shm-size=1g; Kubernetes: an emptyDir of medium Memory mounted at /dev/shm"
    if size is None or free is None:
        yield warning("shared memory", "there is no /dev/shm", remedy)
    elif not own[0].shared_memory_is_writable:
        remedy = "docker run --tmpfs /dev/shm; until then horovodrun does not start: take mpirun"
        yield warning("shared memory", "/dev/shm cannot be written", remedy)
    elif size < needed:
        yield warning("shared memory", f"/dev/shm has {_size(size)}, {_size(needed)} is safe", remedy)
    elif free < _FREE_SHARED_MEMORY_BYTES_A_RANK * len(own):
        figure = f"{_size(free)} of {_size(size)} are free in /dev/shm"
        yield warning("shared memory", figure, f"ls -lS /dev/shm; {remedy}")
    else:
        yield ok("shared memory", f"/dev/shm has {_size(size)}")


def check_open_files(ranks: Sequence[RankFacts]) -> Iterator[Finding]:
    """Rank 0 and a Gloo ring hold connections to the others."""
    least = min(ranks, key=lambda facts: facts.open_files)
    needed = 1024 + 4 * least.size
    if least.open_files < needed:
        yield warning(
            "open files",
            f"{least.host}: at most {least.open_files}, {needed} are safe",
            f"ulimit -n {max(65536, needed)} before the launcher (limits.conf, or LimitNOFILE= of sshd or slurmd)",
        )
    else:
        yield ok("open files", f"{least.open_files} at most")


def check_disk(ranks: Sequence[RankFacts]) -> Iterator[Finding]:
    """Room for checkpoints where rank 0 saves, and one run directory for all hosts."""
    first = ranks[0]
    figure = f"{first.run_dir}: {_size(first.free_bytes)} free"
    if not first.is_writable:
        yield error("run directory", f"{first.run_dir} cannot be written", "--run-dir DIR that you may write to")
    elif first.free_bytes < _DISK_ERROR_BYTES:
        yield error("run directory", figure, "free space there, or --run-dir DIR on a larger disk")
    elif first.free_bytes < _DISK_WARNING_BYTES:
        yield warning("run directory", f"{figure}: a few checkpoints", "free space, or --run-dir DIR on a larger disk")
    blind = [facts.rank for facts in ranks if facts.sees_rank_0_file is False]
    if blind:
        yield warning(
            "run directory",
            f"{ranks_text(blind)} see another {first.run_dir} than rank 0: logs are spread over the hosts, and a"
            " resumed run must have rank 0 on the same host",
            "--run-dir DIR on a file system that all hosts share",
        )
    elif first.is_writable and first.free_bytes >= _DISK_WARNING_BYTES:
        shared = ", shared by all hosts" if len(by_host(ranks)) > 1 and first.sees_rank_0_file else ""
        yield ok("run directory", figure + shared)


def _size(num_bytes: float) -> str:
    return f"{num_bytes / GIB:,.1f} GiB" if num_bytes >= GIB else f"{num_bytes / MIB:,.0f} MiB"
