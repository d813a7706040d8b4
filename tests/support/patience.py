"""Wait for what another thread or process is about to do: for the event itself, since no time is long enough for it.

The limits are for what never happens. They are far above what a machine needs that is slow and has other work.
"""

import json
import threading
import time
from pathlib import Path

SECONDS = 120


def wait_for(condition, seconds=SECONDS, what="nothing happened"):
    """Return what `condition()` is once it is true; fails the test where it never is."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, what() if callable(what) else what
        time.sleep(0.02)
    return found


def wait_for_saves():
    """Wait until no thread of this process writes a checkpoint."""
    for thread in threading.enumerate():
        if thread.name == "hvdtrain-save":
            thread.join(SECONDS)
            assert not thread.is_alive(), "it still saves"


def whole_lines(path):
    """Return the lines of a file of JSON lines, as yet without one that is just being written; none without a file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def catches(pid, number):
    """Return whether a process has a handler for this signal."""
    try:
        lines = Path("/proc", str(pid), "status").read_text().splitlines()
    except OSError:  # it has ended
        return False
    masks = [int(line.split()[1], 16) for line in lines if line.startswith("SigCgt")]
    return bool(masks) and bool(masks[0] >> (number - 1) & 1)
