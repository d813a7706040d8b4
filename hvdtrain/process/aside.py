"""Hosts that have failed repeatedly, and for how long they are left alone. Standard library only."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

_SECONDS_REMEMBERED = 3600.0
_FAILURES = 2
_MOST_BYTES = 1 << 16
_ACCUSED = re.compile(
    r"^hvdtrain: rank \d+ on (\S+) (?:is gone, killed or crashed|has given no sign of life)", re.MULTILINE
)


class Aside:
    """Which hosts are put aside: those that failed twice within an hour; each further time for twice as long.

    Args:
        pause_s: for how long at first; 0: never.
        clock: in seconds.
    """

    def __init__(self, pause_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._pause_s = pause_s
        self._clock = clock
        self._failures: dict[str, list[float]] = {}
        self._until: dict[str, float] = {}

    def blame(self, host: str, is_new: bool = False) -> float:
        """Note that a host has failed; returns for how many seconds it is put aside now, 0: it is not.

        Args:
            host: its name.
            is_new: it has never been part of a run that got anywhere: then one failure is enough.
        """
        now = self._clock()
        recent = [then for then in self._failures.get(host, []) if now - then < _SECONDS_REMEMBERED]
        self._failures[host] = recent = [*recent, now]
        times = len(recent) - (0 if is_new else _FAILURES - 1)
        if times < 1 or not self._pause_s:
            return 0.0
        pause = min(self._pause_s * 2.0 ** min(times - 1, 30), _SECONDS_REMEMBERED)
        self._until[host] = now + pause
        return pause

    def hosts(self) -> set[str]:
        """Return those that are put aside now."""
        now = self._clock()
        return {host for host, until in self._until.items() if now < until}


def sizes_of_logs(run_dir: Path) -> dict[Path, int]:
    """Return how long each rank's log is by now."""
    sizes: dict[Path, int] = {}
    with contextlib.suppress(OSError):  # a name that no folder can have, or one that may not be listed
        for path in (run_dir / "logs").glob("rank-*.log"):
            sizes |= {path: path.stat().st_size} if path.is_file() else {}
    return sizes


def accused_hosts(run_dir: Path, sizes: Mapping[Path, int], hosts: Collection[str]) -> set[str]:
    """Return those of `hosts` whose ranks were lost, as the ranks' logs have said since they had these sizes.

    A rank calls its host by the name that the host has for itself, which may be shorter or longer than the listed one.
    """
    said = set()
    for path in sizes_of_logs(run_dir):
        with contextlib.suppress(OSError), path.open("rb") as file:
            file.seek(max(sizes.get(path, 0), path.stat().st_size - _MOST_BYTES))
            said |= set(_ACCUSED.findall(file.read(_MOST_BYTES).decode(errors="replace")))
    short = {host.partition(".")[0] for host in said}
    return {host for host in hosts if host in said or host.partition(".")[0] in short}
