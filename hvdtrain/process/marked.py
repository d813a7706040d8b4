"""The processes of this host that belong to one supervised run, found by a mark in their environment. Linux only."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

MARK = "HVDTRAIN_SUPERVISED"
_RANK_VARIABLES = (b"OMPI_COMM_WORLD_RANK=", b"HOROVOD_RANK=", b"PMI_RANK=", b"PMIX_RANK=", b"SLURM_PROCID=")
_SECONDS_TO_LEAVE = 10.0
_PASSING_ON = {"mpirun", "mpiexec", "orterun", "prterun", "mpiexec.hydra"}


def marked_processes(mark: str) -> list[int]:
    """Return the processes of this host that were started with our mark in their environment."""
    wanted = f"{MARK}={mark}".encode()
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    return [pid for pid in pids if wanted in _read(pid, "environ").split(b"\0") and pid != os.getpid()]


def ranks_among(pids: list[int]) -> list[int]:
    """Return those that a launcher has started as ranks, and their children; no launcher is among them."""
    return [pid for pid in pids if _is_python(pid) and _has_rank(pid)]


def training_among(pids: list[int]) -> list[int]:
    """Return those that are `python -m hvdtrain`, be it as a rank or alone."""
    return [pid for pid in pids if _is_python(pid) and b"\0-m\0hvdtrain\0" in _read(pid, "cmdline")]


def kill(pid: int, number: signal.Signals) -> None:
    """Send a signal to a process, if it is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def end_all(mark: str) -> list[int]:
    """End all marked processes: asked first, killed after some seconds. Returns those that even so do not end."""
    for pid in marked_processes(mark):
        kill(pid, signal.SIGTERM)
    started, left = time.monotonic(), marked_processes(mark)
    while left and time.monotonic() < started + 2 * _SECONDS_TO_LEAVE:
        if time.monotonic() > started + _SECONDS_TO_LEAVE:
            for pid in left:
                kill(pid, signal.SIGKILL)
        time.sleep(0.1)
        left = marked_processes(mark)
    return left


def ask_to_stop(mark: str, launcher: int, command: Sequence[str]) -> bool:
    """Ask one rank to save and stop, which suffices: all ranks agree. Returns whether there is one on this host.

    Otherwise the ranks are on other hosts, or not yet started: the launcher is asked, which may be done again.

    Args:
        mark: of the processes.
        launcher: its process.
        command: what it was started with.
    """
    pids = marked_processes(mark)
    ranks = training_among(pids) or ranks_among(pids)
    if ranks:
        kill(min(ranks), signal.SIGTERM)
        return True
    # Launchers but horovodrun pass SIGUSR1 on, also the one that horovodrun itself starts with MPI.
    is_horovodrun = Path(command[0]).name == "horovodrun"
    below = [pid for pid in pids if _name(pid) in _PASSING_ON] if is_horovodrun else []
    for pid in below or [launcher]:
        kill(pid, signal.SIGTERM if is_horovodrun and not below else signal.SIGUSR1)
    return False


def _is_python(pid: int) -> bool:
    """Tell Python from a shell, and a rank from `horovodrun`, whose command line holds the rank's."""
    words = _read(pid, "cmdline").split(b"\0")
    is_launcher = any(name in word for word in words[1:2] for name in (b"horovodrun", b"mpirun", b"mpiexec"))
    return b"python" in words[0].rpartition(b"/")[2] and not is_launcher


def _name(pid: int) -> str:
    return os.fsdecode(_read(pid, "cmdline").partition(b"\0")[0].rpartition(b"/")[2])


def _has_rank(pid: int) -> bool:
    return any(entry.startswith(_RANK_VARIABLES) for entry in _read(pid, "environ").split(b"\0"))


def _read(pid: int, name: str) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/{name}").read_bytes()
    return b""
