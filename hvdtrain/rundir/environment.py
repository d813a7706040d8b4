"""What a run ran on: versions, hosts, devices, launcher, and the state of the code."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import socket
import subprocess
from typing import Any

import torch

from hvdtrain.process.processor import cpuinfo

_PACKAGES = ("hvdtrain", "horovod", "torch", "torchvision", "numpy", "mpi4py", "tokenizers", "transformers")
# Of the environment only what explains a run: the rest may hold secrets (Horovod has a key of its own there, too).
_VARIABLES = (
    *("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID", "OMPI_MCA_mpi_yield_when_idle", "OMPI_MCA_btl"),
    *("HOROVOD_CONTROLLER", "HOROVOD_CPU_OPERATIONS", "HOROVOD_FUSION_THRESHOLD", "HOROVOD_CYCLE_TIME"),
)


def describe_rank(device: torch.device) -> dict[str, Any]:
    """Return what may differ between ranks."""
    is_gpu = device.type == "cuda"
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "device": torch.cuda.get_device_name(device) if is_gpu else _cpu_name(),
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


def describe_environment(launcher: str, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what `environment.json` holds."""
    settings = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    return {
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "launcher": launcher,
        "variables": settings,
        "ranks": ranks,
        "git": _git_state(),
    }


def _cpu_name() -> str:
    """Return what the processor calls itself, or its architecture where it does not say."""
    names = (line.partition(":")[2].strip() for line in cpuinfo().splitlines() if line.startswith("model name"))
    return next(names, platform.machine())


def _version(package: str) -> str | None:
    if package == "torch":
        return torch.__version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_state() -> dict[str, Any] | None:
    """Return the commit of the current directory and whether files differ from it; None outside a repository."""
    commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
    return None if commit is None else {"commit": commit, "modified": bool(changes)}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
