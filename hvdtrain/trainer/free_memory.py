"""How much memory there is for a rank: of its device, and of its host."""

from __future__ import annotations

from pathlib import Path

import torch

from hvdtrain.trainer.job import Job


def available(job: Job) -> tuple[int | None, str]:
    """Return the bytes that one rank may take, and where; None where nobody knows."""
    device = job.world.device
    if device.type == "cuda":
        # What torch keeps for itself, of a model that was tried out before, is free for it.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept, "are free on the GPU"
    return in_host_memory(job.world.local_size)


def in_host_memory(ranks: int) -> tuple[int | None, str]:
    """Return the same of host memory, for each of so many ranks on a host."""
    limits = []
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        limits.append(int(lines["MemAvailable"].split()[0]) * 1024)
        top = Path("/sys/fs/cgroup")
        limits.append(int((top / "memory.max").read_text()) - int((top / "memory.current").read_text()))
    except (OSError, ValueError, KeyError):  # no Linux, no limit, another cgroup version
        pass
    return (min(limits) // ranks, f"are free here for each of {ranks}") if limits else (None, "")
