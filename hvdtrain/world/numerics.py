"""How exactly products are computed, and whether two runs agree bit by bit, on GPUs: settings of the whole process."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, MutableMapping, Sequence
from typing import Any

import torch

from hvdtrain.errors import ConfigError, on_all_ranks
from hvdtrain.settings import Precision

# Read when cuBLAS and NCCL start. cuBLAS adds in one order only where each stream has its own workspace. NCCL chooses
# by size and machine, and NVLink's own sums (NVLS) may differ from call to call: a ring adds in the order of the ranks.
REPEATABLE = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "NCCL_ALGO": "Ring",
    "NCCL_PROTO": "Simple",
    "NCCL_NVLS_ENABLE": "0",
}


@contextlib.contextmanager
def repeatable(is_asked: bool, environ: MutableMapping[str, str] = os.environ) -> Iterator[None]:
    """Within, have torch, cuBLAS and NCCL take algorithms that give the same bits again, if that is asked.

    Enter it on all ranks before the first collective. What has no such algorithm raises torch's RuntimeError, which
    names it. Variables that the user has set stay.
    """
    if not is_asked:
        yield
        return
    for name, value in REPEATABLE.items():
        environ.setdefault(name, value)
    torch_wide = (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
    filling: Any = torch.utils.deterministic
    fills, tries = filling.fill_uninitialized_memory, torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    filling.fill_uninitialized_memory = False  # for finding faults; it writes all memory once more
    torch.backends.cudnn.benchmark = False  # which kernel wins depends on the clock
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(torch_wide[0], warn_only=torch_wide[1])
        filling.fill_uninitialized_memory = fills
        torch.backends.cudnn.benchmark = tries


@contextlib.contextmanager
def fp32_products(precision: Precision, device: torch.device) -> Iterator[None]:
    """Within, compute products of fp32 matrices on GPUs as fp32, or as TF32 where that is the precision.

    torch computes convolutions as TF32 unless it is told otherwise, matrix products as fp32: fp32 shall be fp32.

    Raises:
        ConfigError: TF32 is asked for on a CPU.
    """
    if device.type != "cuda":
        if precision == "tf32":
            raise on_all_ranks(
                ConfigError("--train.precision tf32 is for NVIDIA GPUs, and there is none here: use fp32 or bf16")
            )
        yield
        return
    cudnn: Any = torch.backends.cudnn
    switches = [
        *_switches(torch.backends.cuda.matmul, [torch.backends.cuda.matmul]),
        *_switches(cudnn, [getattr(cudnn, name) for name in ("conv", "rnn") if hasattr(cudnn, name)]),
    ]
    values = {"allow_tf32": precision == "tf32", "fp32_precision": "tf32" if precision == "tf32" else "ieee"}
    try:
        for part, name, _ in switches:
            setattr(part, name, values[name])
        yield
    finally:
        for part, name, before in switches:
            setattr(part, name, before)


def _switches(whole: Any, parts: Sequence[Any]) -> list[tuple[Any, str, Any]]:
    """Return what says how a library multiplies fp32: an object, the name of its attribute, and what it is now.

    torch has an older word for it and a newer one, and raises where a program that has used the newer one for a part
    is asked by the older one.
    """
    try:
        return [(whole, "allow_tf32", whole.allow_tf32)]
    except RuntimeError:
        return [(part, "fp32_precision", part.fp32_precision) for part in parts]
