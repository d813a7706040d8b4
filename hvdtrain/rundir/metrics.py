"""Reading `metrics.jsonl` back. A crash or a power failure may have left anything in it."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Millions of lines, far more than a run logs: a file may also pretend to be large.
_MOST_BYTES = 1 << 30
_LONGEST_LINE = 1 << 20


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the lines of a metrics file that are whole and sound, and how many are not.

    Raises:
        OSError: as `each_line`.
    """
    lines = [*each_line(path)]
    sound = [line for line in lines if line is not None]
    return sound, len(lines) - len(sound)


def each_line(path: Path) -> Iterator[dict[str, Any] | None]:
    """Yield the lines of a metrics file; None for one that is damaged.

    A last line without its end was cut short by a crash and is not counted.

    Raises:
        OSError: the file cannot be read, or has more than 1 GiB; one that does not exist is empty.
    """
    if not path.exists():
        return
    if not path.is_file():
        raise OSError(0, "it is no regular file")
    if path.stat().st_size > _MOST_BYTES:
        raise OSError(errno.EFBIG, "it has more than 1 GiB")
    with path.open("rb") as file:
        for line in file:
            if line.strip() and line.endswith(b"\n"):
                yield parse_line(line)


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
