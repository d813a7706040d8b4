"""Reading `metrics.jsonl` back. A crash or a power failure may have left anything in it."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

# Millions of lines, far more than a run logs: a file may also pretend to be large.
_MOST_BYTES = 1 << 30
_LONGEST_LINE = 1 << 20


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the lines of a metrics file that are whole and sound, and how many are not.

    A last line without its end was cut short by a crash and is not counted.

    Raises:
        OSError: the file cannot be read, or has more than 1 GiB; one that does not exist is empty.
    """
    if not path.exists():
        return [], 0
    if not path.is_file():
        raise OSError(0, "it is no regular file")
    if path.stat().st_size > _MOST_BYTES:
        raise OSError(errno.EFBIG, "it has more than 1 GiB")
    sound, num_bad = [], 0
    with path.open("rb") as file:
        for line in file:
            if line.strip() and line.endswith(b"\n"):
                values = parse_line(line)
                if values is None:
                    num_bad += 1
                else:
                    sound.append(values)
    return sound, num_bad


def parse_line(line: bytes) -> dict[str, Any] | None:
    """Return what a line of a metrics file holds; None where it is damaged."""
    if len(line) > _LONGEST_LINE:
        return None
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_sound = isinstance(values, dict) and type(values.get("step")) is int
    return values if is_sound else None
