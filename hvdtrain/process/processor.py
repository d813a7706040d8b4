"""What Linux tells of this machine's processors."""

from __future__ import annotations

import functools
from pathlib import Path


@functools.cache
def cpuinfo() -> str:
    """Return Linux's description of the processors; empty on other systems."""
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def words_of(description: str, name: str) -> set[str]:
    """Return all words that a description of processors has under a name, such as "flags"."""
    lines = (line.partition(":") for line in description.splitlines())
    return {word for head, _, values in lines if head.strip() == name for word in values.split()}
