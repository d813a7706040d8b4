"""The processes of a supervised run, found in /proc, for those who want to kill them."""

from __future__ import annotations

import time
from pathlib import Path

from hvdtrain.process.marked import MARK

WAIT_S = 240


class Family:
    """What a supervisor has started, directly or not: the processes that carry its mark.

    Orphans of a killed launcher have another parent, but the mark.
    """

    def __init__(self, supervisor: int) -> None:
        self.supervisor = supervisor
        self._mark = b""

    def pids(self) -> list[int]:
        """Return those that are there now."""
        marked = {}
        for path in Path("/proc").iterdir():
            if path.name.isdigit() and int(path.name) != self.supervisor:
                entries = read(int(path.name), "environ").split(b"\0")
                marked[int(path.name)] = next((entry for entry in entries if entry.startswith(MARK.encode())), b"")
        for pid, mark in marked.items():
            if mark and parent(pid) == self.supervisor:
                self._mark = mark
        return sorted(pid for pid, mark in marked.items() if mark and mark == self._mark)

    def pipeline(self) -> tuple[int | None, int | None]:
        """Return the launcher and the reader of its output, which a shell below the supervisor has started."""
        shells = [pid for pid in self.pids() if parent(pid) == self.supervisor]
        children = [pid for pid in self.pids() if parent(pid) in shells]
        readers = [pid for pid in children if read(pid, "comm").strip() == b"cat"]
        launchers = [pid for pid in children if pid not in readers and read(pid, "comm").strip() != b"bash"]
        return launchers[0] if launchers else None, readers[0] if readers else None


def parent(pid: int) -> int:
    """Return the parent of a process, 0 if it is gone."""
    words = read(pid, "stat").rpartition(b")")[2].split()
    return int(words[1]) if words else 0


def read(pid: int, name: str) -> bytes:
    """Return a file of /proc, empty if the process is gone."""
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def wait_for(condition, what: str, poll_s: float = 0.02):
    """Return what `condition` returns as soon as it is true.

    Raises:
        TimeoutError: that took too long.
    """
    deadline = time.monotonic() + WAIT_S
    while not (result := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {WAIT_S} s for {what}")
        time.sleep(poll_s)
    return result
