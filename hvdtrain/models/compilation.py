"""Whether torch.compile can be counted on for a device: what it needs to make kernels for GPUs."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

# Of bfloat16, which Triton's kernels need: the A100 and later.
_CAPABILITY = (8, 0)


def can_compile_for(device: torch.device) -> bool:
    """Return whether kernels can be compiled for this GPU; of CPUs, whose kernels gain little by it, never."""
    return device.type == "cuda" and _has_tools() and torch.cuda.get_device_capability(device) >= _CAPABILITY


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Within, what has been given to the compiler runs as it was written.

    For modes that see every operator: the compiler passes over a function that it meets under one of them, says nothing
    and never looks at it again, so that a model which was once measured would train uncompiled ever after.
    """
    given = torch.compile
    with contextlib.ExitStack() as stack:

        def run_as_written() -> None:
            stack.enter_context(torch.compiler.set_stance("force_eager"))

        def compile_later(*args: Any, **kwargs: Any) -> Any:
            torch.compile = given
            run_as_written()
            return given(*args, **kwargs)

        if "torch._dynamo" in sys.modules:
            run_as_written()
        else:  # the compiler takes as long to load as torch itself: nothing has been given to it so far
            torch.compile = compile_later
        try:
            yield
        finally:
            torch.compile = given


def is_compiled(model: nn.Module) -> bool:
    """Return whether the model, or a part of it, has been given to the compiler by `nn.Module.compile`."""
    return any(getattr(module, "_compiled_call_impl", None) is not None for module in model.modules())


@functools.cache
def _has_tools() -> bool:
    """Triton builds what launches a kernel with a C compiler, which containers often lack."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    return bool(compiler) and importlib.util.find_spec("triton") is not None
