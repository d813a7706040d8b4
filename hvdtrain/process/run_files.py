"""Names inside a run directory that are read without torch, too. Standard library only."""

from __future__ import annotations

import contextlib
from pathlib import Path

CHECKPOINTS = "checkpoints"
LATEST = "latest"
BEST = "best"

_MOST_BYTES = 256


def named_checkpoint(run_dir: Path, pointer: str = LATEST) -> str:
    """Return the name that `checkpoints/latest` (or `best`) holds; empty where there is none that can be read."""
    path = run_dir / CHECKPOINTS / pointer
    with contextlib.suppress(OSError):
        if path.is_file():  # neither a directory nor a pipe, which would be waited for
            with path.open("rb") as file:
                return file.read(_MOST_BYTES).decode("utf-8", "replace").strip()
    return ""
