"""Whether this process works, where no step tells: preparing data may take hours, and a hang uses no processor time."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

# Of one core. A thread that polls, as Horovod's do while they wait, uses a few hundredths.
_WORKING = 0.1


class BusyClock:
    """Tells work from waiting by processor time: of the main thread and of those that began after `start`.

    The threads that were there before are Horovod's and MPI's, which spin while they wait. Linux only; elsewhere a
    process is never said to work.
    """

    def __init__(self) -> None:
        self._ignored: set[str] = set()
        self._looked = 0.0
        self._used_s = 0.0

    def start(self) -> None:
        """Remember which threads there are; of these, only the calling one counts."""
        self._ignored = _threads() - {str(threading.get_native_id())}
        self._looked, self._used_s = time.monotonic(), _seconds(_threads() - self._ignored)

    def is_working(self) -> bool:
        """Return whether they have used a tenth of a core or more since the last call, the calling thread aside."""
        now = time.monotonic()
        used_s = _seconds(_threads() - self._ignored - {str(threading.get_native_id())})
        share = (used_s - self._used_s) / max(now - self._looked, 1e-3)
        self._looked, self._used_s = now, used_s
        return share >= _WORKING


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
