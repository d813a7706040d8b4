"""Whether torch.compile can be counted on for a device: what it needs to make kernels for GPUs."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from contextlib import AbstractContextManager

import torch
from torch import nn

# Of bfloat16, which Triton's kernels need: the A100 and later.
_CAPABILITY = (8, 0)


def can_compile_for(device: torch.device) -> bool:
    """Return whether kernels can be compiled for this GPU; of CPUs, whose kernels gain little by it, never."""
    return device.type == "cuda" and _has_tools() and torch.cuda.get_device_capability(device) >= _CAPABILITY


def uncompiled() -> AbstractContextManager[None]:
    """Within, what has been given to the compiler runs as it was written.

    For modes that see every operator: the compiler passes over a function that it meets under one of them, says nothing
    and never looks at it again, so that a model which was once measured would train uncompiled ever after.
    """
    context: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return context


def is_compiled(model: nn.Module) -> bool:
    """Return whether the model, or a part of it, has been given to the compiler by `nn.Module.compile`."""
    return any(getattr(module, "_compiled_call_impl", None) is not None for module in model.modules())


@functools.cache
def _has_tools() -> bool:
    """Triton builds what launches a kernel with a C compiler, which containers often lack."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    return bool(compiler) and importlib.util.find_spec("triton") is not None
