"""GPUs of a host on which nobody trains, though nobody has said so: torch then takes the CPU without a word."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from hvdtrain.install.clone import setup_command

# What the drivers of NVIDIA and of AMD tell of themselves and of their cards, seen in containers, too.
NVIDIA = Path("/proc/driver/nvidia")
AMD = Path("/dev/kfd")
# Values of CUDA_VISIBLE_DEVICES that hide all of them: people's own, and Slurm's.
_NONE = ("", "-1", "none", "nodevfiles", "void")


def unused_gpus(environ: Mapping[str, str] = os.environ, nvidia: Path = NVIDIA, amd: Path = AMD) -> str:
    """Say which GPUs of this host torch does not use, and why; "" where it uses them, or is told not to."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if torch.cuda.is_available() or (visible is not None and visible.strip().lower() in _NONE):
        return ""
    cards = [*(nvidia / "gpus").glob("*")]
    if cards:
        return f"{len(cards)} of NVIDIA here: {_why_not_nvidia(visible, nvidia)}"
    if torch.version.hip or amd.exists():
        return "of AMD: hvdtrain trains on NVIDIA's GPUs and on CPUs"
    if torch.xpu.is_available():
        return "of Intel: hvdtrain trains on NVIDIA's GPUs and on CPUs"
    if torch.backends.mps.is_available():
        return "of Apple: hvdtrain trains on NVIDIA's GPUs and on CPUs"
    return ""


def _why_not_nvidia(visible: str | None, nvidia: Path) -> str:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built for CPUs. Run {setup_command()} in an environment with a CUDA torch"
    if visible is not None:
        return f"CUDA_VISIBLE_DEVICES={visible} names none of them. Unset it"
    return (
        f"CUDA {torch.version.cuda}, for which torch is built, does not start on the driver {_driver(nvidia)}: it is"
        " too old (`nvidia-smi` says which CUDA it knows), or this container or job was given no GPU"
        " (docker run --gpus all)"
    )


def _driver(nvidia: Path) -> str:
    """Return the driver's version: the number in "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  ..."."""
    try:
        words = (nvidia / "version").read_text().splitlines()[0].split()
    except (OSError, IndexError):
        return "here"
    numbers = [word for word in words if "." in word and word.replace(".", "").isdigit()]
    return numbers[0] if numbers else "here"
