"""What is known of files: computed once per host, and again when a file has changed.

    CACHE/known/HASH.json       for each file or part of one: size, times and inode, and what was computed from it

A change is noticed by the size, the inode and both times of a file: the system sets the time of the last change of
data *or* attributes (ctime) itself, so that restoring the modification time hides nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvdtrain.settings.files import locked

FORMAT_VERSION = 1
# A file that changed just before it was read may change once more without another time stamp: file systems' clocks tick
# every few milliseconds, FAT's every two seconds.
_SETTLED_NS = 3_000_000_000


class KnownFiles:
    """Remembers what was computed from files, as long as they stay the same.

    Args:
        cache: directory of prepared text.
        corpus: names what the files belong to; each has a memory of its own, which holds no more than its last use.
    """

    def __init__(self, cache: Path, corpus: str) -> None:
        self.can_keep = True
        """False after the memory could not be written."""
        self._path = cache / "known" / f"{hashlib.sha256(corpus.encode()).hexdigest()[:16]}.json"

    def values(self, files: Mapping[str, Path], compute: Callable[[str], Any]) -> dict[str, Any]:
        """Return a value that JSON can hold for each name, computed where the name's file is new or has changed.

        Of several processes of a host one computes, the others wait for it. Where the memory cannot be written,
        everything is computed every time.

        Args:
            files: which file each name's value is computed from.
            compute: returns the value for a name.
        """
        known = self._recall(files)
        if len(known) < len(files):
            with self._exclusive():
                known = self._recall(files)
                missing = {name: path for name, path in files.items() if name not in known}
                if missing:
                    known |= {name: _observe(path, name, compute) for name, path in missing.items()}
                    self._keep(known)
        return {name: known[name].value for name in files}

    def _recall(self, files: Mapping[str, Path]) -> dict[str, _Known]:
        """Return what is known of the files that are as they were."""
        try:
            memory = json.loads(self._path.read_text()) if self._path.is_file() else {}
            entries = {name: _Known(*entry) for name, entry in memory["entries"].items()}
            if memory["format"] != FORMAT_VERSION or memory["checksum"] != _checksum(memory["entries"]):
                return {}
        except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
            return {}  # there is none, or it is damaged
        return {
            name: entries[name] for name, path in files.items() if name in entries and entries[name].is_still_of(path)
        }

    def _keep(self, known: Mapping[str, _Known]) -> None:
        """Write down all that may be trusted later."""
        entries = {name: (entry.state, entry.value) for name, entry in known.items() if entry.state is not None}
        temporary = self._path.with_name(f"{self._path.name}.writing-{os.getpid()}")
        try:
            memory = {"format": FORMAT_VERSION, "checksum": _checksum(entries), "entries": entries}
            temporary.write_text(json.dumps(memory))
            temporary.replace(self._path)
        except OSError:
            self.can_keep = False
            with contextlib.suppress(OSError):
                temporary.unlink()

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):  # a directory that cannot be written: everyone computes for himself
                stack.enter_context(locked(self._path.with_suffix(".lock")))
            yield


@dataclass(frozen=True)
class _Known:
    """What was computed from a file."""

    state: list[int] | None
    """The file's, as `state_of` returns it; None where another change could not be told from it."""
    value: Any

    def is_still_of(self, path: Path) -> bool:
        """Tell whether the file is as it was."""
        return self.state is not None and self.state == state_of(path)


def _checksum(entries: Any) -> str:
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def _observe(path: Path, name: str, compute: Callable[[str], Any]) -> _Known:
    now, before = time.time_ns(), state_of(path)
    value = compute(name)
    is_settled = before is not None and max(before[1:3]) < now - _SETTLED_NS
    return _Known(before if is_settled and state_of(path) == before else None, value)


def state_of(path: Path) -> list[int] | None:
    """Return size, time of modification, time of change and inode; None where there is no file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]
