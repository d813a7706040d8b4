"""Ends a launcher whose supervisor has been killed. Standard library only.

Ranks on the supervisor's own host notice by themselves that it is gone, save and end. Where it has ranks on other hosts
only, nobody would: their launcher has lost nothing that it knows of.

    python -m hvdtrain.process.guard SUPERVISOR STARTED MARK LAUNCHER PROGRAM
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

from hvdtrain.process.ancestors import Ancestor, this_process
from hvdtrain.process.marked import MARK, ask_to_stop, end_all, marked_processes
from hvdtrain.process.working_directory import module_command

_SECONDS_BETWEEN_LOOKS = 1.0
# Ranks that notice by themselves are let alone; then all are asked; at last what is left is ended.
_SECONDS_BEFORE_ASKING = 5.0
_SECONDS_TO_SAVE = 300.0


@contextlib.contextmanager
def guarding(mark: str, launcher: int, command: Sequence[str]) -> Iterator[None]:
    """Have a process beside this one that ends a launcher if this one is lost meanwhile.

    Args:
        mark: of the launcher and what it has started.
        launcher: its process.
        command: what it was started with.
    """
    own = this_process()
    words = [str(own.pid), str(own.started), mark, str(launcher), command[0]] if own else []
    guard = None
    with contextlib.suppress(OSError):  # a run without a guard is better than none
        guard = subprocess.Popen(
            [*module_command("hvdtrain.process.guard"), *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env={name: value for name, value in os.environ.items() if name != MARK},
        )
    try:
        yield
    finally:
        if guard is not None:
            guard.kill()
            guard.wait()


def watch(supervisor: Ancestor, mark: str, launcher: int, command: Sequence[str]) -> None:
    """Wait until a supervisor is gone, then for its run to save and end, and end what does not."""
    while supervisor.is_alive():
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    gone, is_asked = time.monotonic(), False
    while marked_processes(mark) and time.monotonic() < gone + _SECONDS_TO_SAVE:
        if not is_asked and time.monotonic() > gone + _SECONDS_BEFORE_ASKING:
            is_asked = ask_to_stop(mark, launcher, command)
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    end_all(mark)


def main(arguments: Sequence[str]) -> int:
    """Run the command line."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    pid, started, mark, launcher, program = arguments
    watch(Ancestor(int(pid), int(started)), mark, int(launcher), [program])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
