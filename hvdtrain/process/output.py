"""Standard output, which may know few signs, and whose reader may leave. Standard library only."""

from __future__ import annotations

import io
import os
import select
import sys
from collections.abc import Callable


def print_anything() -> None:
    """Have standard output take any sign: a locale may know fewer than what is printed (`±`, what a model writes)."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")


def while_read(answer: Callable[[], int]) -> int:
    """Return what `answer` returns, an exit code; 0 where it was ended by a reader of standard output that has gone."""
    try:
        code = answer()
        _is_unread()
    except BrokenPipeError:
        if not _is_unread():
            raise
        return 0
    return code


def _is_unread() -> bool:
    """Return whether the reader of standard output has gone, as `head` does; what is left is then printed nowhere."""
    try:
        sys.stdout.flush()
        if not _has_lost_reader(sys.stdout.fileno()):
            return False
    except BrokenPipeError:
        pass
    except (OSError, ValueError):  # no room on the disk, or a stream in memory
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
    return True


def _has_lost_reader(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))
