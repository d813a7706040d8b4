"""What Horovod says of itself."""

from __future__ import annotations

import importlib
from typing import Any

_NOTHING = object()
_PARTS = ("mpi", "gloo", "nccl", "cuda", "rocm", "ccl", "ddl")


def built_with() -> frozenset[str]:
    """Return what Horovod was built with, of mpi, gloo, nccl, cuda, rocm, ccl and ddl; nothing where it is missing."""
    return frozenset(part for part in _PARTS if ask_horovod(f"{part}_built", otherwise=False))


def ask_horovod(name: str, *arguments: Any, otherwise: Any = _NOTHING) -> Any:
    """Call a function of `horovod.torch` by its name.

    Args:
        name: of the function.
        arguments: for it.
        otherwise: returned where Horovod is not installed, or does not load.

    Raises:
        ImportError: it does not load, and there is no `otherwise`.
    """
    try:
        horovod = importlib.import_module("horovod.torch")
    except ImportError:
        if otherwise is _NOTHING:
            raise
        return otherwise
    return getattr(horovod, name)(*arguments)
