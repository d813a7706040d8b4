"""Whether this process works, where no step tells: preparing data may take hours, and a hang does nothing."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path

# Of one core. A thread that polls, as Horovod's do while they wait, uses a few hundredths.
_WORKING = 0.1
# A slow download that is written to a file; what ranks tell each other is far less.
_WORKING_BYTES_PER_S = 100_000


class BusyClock:
    """Tells work from waiting: by the processor time, and the bytes read and written, of the threads that do the work.

    These are the main thread and those that began after `start`.

    The threads that were there before are Horovod's, MPI's and Gloo's: they spin while they wait, and ask each other a
    thousand times a second whether there is anything to do. Linux only; elsewhere a process is never said to work.
    """

    def __init__(self) -> None:
        self._ignored: set[str] = set()
        self._looked = 0.0
        self._used_s = 0.0
        self._bytes = 0
        self._ignored_bytes: dict[str, int] = {}

    def start(self) -> None:
        """Remember which threads there are; of these, only the calling one counts."""
        self._ignored = _threads() - {str(threading.get_native_id())}
        self._looked, self._bytes = time.monotonic(), self._bytes_without(self._ignored)
        self._used_s = _seconds(_threads() - self._ignored)

    def is_working(self) -> bool:
        """Return whether that was a tenth of a core, or 100 kB/s, since the last call; the calling thread aside."""
        ignored = self._ignored | {str(threading.get_native_id())}
        now, moved = time.monotonic(), self._bytes_without(ignored)
        used_s = _seconds(_threads() - ignored)
        seconds = max(now - self._looked, 1e-3)
        share, rate = (used_s - self._used_s) / seconds, (moved - self._bytes) / seconds
        self._looked, self._used_s, self._bytes = now, used_s, moved
        return share >= _WORKING or rate >= _WORKING_BYTES_PER_S

    def _bytes_without(self, ignored: set[str]) -> int:
        """Return the bytes of this process without those of some threads."""
        for thread in ignored:
            with contextlib.suppress(OSError, ValueError):  # it has ended: what it moved until then stays known
                self._ignored_bytes[thread] = _bytes(f"self/task/{thread}")
        try:
            return _bytes("self") - sum(self._ignored_bytes.values())
        except (OSError, ValueError):
            return 0


def _threads() -> set[str]:
    try:
        return {path.name for path in Path("/proc/self/task").iterdir()}
    except OSError:
        return set()


def _seconds(threads: set[str]) -> float:
    """Return the processor time of threads; one that has ended takes its time with it."""
    ticks = 0
    for thread in threads:
        try:
            fields = Path(f"/proc/self/task/{thread}/stat").read_bytes().rpartition(b")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        except (OSError, IndexError, ValueError):
            continue
    return ticks / os.sysconf("SC_CLK_TCK")


def _bytes(process: str) -> int:
    """Return what a process, or a thread such as self/task/1, has read and written so far, from the page cache too.

    A process's also counts the threads that have ended.

    Raises:
        OSError, ValueError: that cannot be known.
    """
    lines = Path(f"/proc/{process}/io").read_text().splitlines()[:2]
    return sum(int(line.partition(":")[2]) for line in lines)
