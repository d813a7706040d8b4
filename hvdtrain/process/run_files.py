"""Names inside a run directory that are read without torch, too. Standard library only."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from pathlib import Path

CHECKPOINTS = "checkpoints"
LATEST = "latest"
BEST = "best"
LOCK = "lock"
METRICS = "metrics.jsonl"

_MOST_BYTES = 256
_MOST_BYTES_OF_A_LINE = 1 << 18


def is_run(folder: Path) -> bool:
    """Return whether a directory is a run's, even of one that has only begun, or a sweep's."""
    signs = (METRICS, CHECKPOINTS, "logs", "sweep.json")
    return (folder / LOCK).is_file() and any((folder / sign).exists() for sign in signs)


def runs_in(folder: Path) -> str:
    """Return a hint for whoever names a folder of runs, such as a sweep's, in the place of a run; empty without any."""
    with contextlib.suppress(OSError):
        runs = [path.parent for name in (CHECKPOINTS, METRICS) for path in folder.glob(f"*/{name}")]
        if runs:
            newest = max(runs, key=lambda run: run.stat().st_mtime)
            return f"; it is a folder of runs: name one, such as {newest}"
    return ""


def named_checkpoint(run_dir: Path, pointer: str = LATEST) -> str:
    """Return the name that `checkpoints/latest` (or `best`) holds; empty where there is none that can be read."""
    path = run_dir / CHECKPOINTS / pointer
    with contextlib.suppress(OSError):
        if path.is_file():  # neither a directory nor a pipe, which would be waited for
            with path.open("rb") as file:
                return file.read(_MOST_BYTES).decode("utf-8", "replace").strip()
    return ""


def lacks_its_end(run_dir: Path) -> bool:
    """Return whether a run has metrics, and their last line does not say that it has finished."""
    path = run_dir / METRICS
    with contextlib.suppress(OSError, ValueError, RecursionError):
        if not path.is_file():  # a pipe would be waited for
            return False
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _MOST_BYTES_OF_A_LINE))
            lines = file.read(_MOST_BYTES_OF_A_LINE).split(b"\n")
        last = next((line for line in reversed(lines) if line.strip()), b"")
        values = json.loads(last) if b'"event"' in last else {}
        return not isinstance(values, dict) or values.get("event") != "finished"
    return False


def holder_of(run_dir: Path) -> str:
    """Return who holds the lock of a run's directory, such as `process 12 on node2`; empty where nobody does."""
    path = run_dir / LOCK
    with contextlib.suppress(OSError):
        if not path.is_file():
            return ""
        with path.open("r+", encoding="utf-8", errors="replace") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    return file.read(_MOST_BYTES).strip() or "another process"
    return ""
