"""Reading `metrics.jsonl` back. A crash or a power failure may have left anything in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the lines of a metrics file that are whole and sound, and how many are not.

    A last line without its end was cut short by a crash and is not counted.

    Raises:
        OSError: the file cannot be read; one that does not exist is empty.
    """
    if not path.exists():
        return [], 0
    if not path.is_file():
        raise OSError(0, "it is no regular file")
    lines = [line for line in path.read_bytes().split(b"\n")[:-1] if line.strip()]
    sound = [values for line in lines if (values := _parse(line)) is not None]
    return sound, len(lines) - len(sound)


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_sound = isinstance(values, dict) and type(values.get("step")) is int
    return values if is_sound else None
