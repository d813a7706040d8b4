"""The launcher that started this process: since when it runs, and whether it is still there. Standard library only.

A launcher that is killed takes its ranks with it only if they notice: Open MPI's daemons notice a lost `mpirun`, but
nobody notices a lost `horovodrun` under MPI, and its ranks would train on without an owner.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

OWNER = "HVDTRAIN_OWNER"
"""Environment variable: the programs that have started the launcher, without any of which its ranks end."""
_LAUNCHERS = {
    *("horovodrun", "mpirun", "mpiexec", "orterun", "prterun", "prun", "prted", "orted"),
    *("mpiexec.hydra", "hydra_pmi_proxy", "hydra_bstrap_proxy"),
}
# Of Slurm, PALS, ALPS, LSF, Flux and torch: what else may stand above a rank.
_STARTERS = {
    *("slurmstepd", "srun", "palsd", "apinit", "aprun", "jsrun", "jsmd", "flux-shell", "flux-broker"),
    *("torchrun", "accelerate"),
}
_SHELLS = {"sh", "bash", "dash", "ksh", "zsh", "perl"}
_MOST_ANCESTORS = 64


@dataclass(frozen=True)
class Ancestor:
    """A process that this one belongs to. The two numbers name it: a process id alone may be used again."""

    pid: int
    started: int
    """Clock ticks after the host was started."""

    def is_alive(self) -> bool:
        """Return whether it still runs; one that has ended and waits for its parent to notice does not."""
        state = _state(self.pid)
        return state is not None and state.started == self.started and state.letter not in "ZX"

    def age_s(self) -> float:
        """Return the seconds since it was started."""
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        return max(0.0, now - self.started / os.sysconf("SC_CLK_TCK"))


@dataclass(frozen=True)
class _State:
    letter: str
    parent: int
    started: int


def find_launcher() -> Ancestor | None:
    """Return the first launcher above this process on this host; None where there is none, or this is not Linux.

    Of `horovodrun`, which starts `mpirun`, which starts ranks, it is `horovodrun`.
    """
    launchers = [ancestor for ancestor in _ancestors() if _is_launcher(ancestor.pid)]
    return launchers[-1] if launchers else None


def is_launched() -> bool:
    """Return whether anything that starts ranks is seen above this process; True where nothing can be seen."""
    return this_process() is None or any(
        _is_launcher(ancestor.pid) or _names(ancestor.pid) & _STARTERS for ancestor in _ancestors()
    )


def given_to_launcher() -> set[str]:
    """Return the names of the variables that this process's launcher was started with; none where it is not seen."""
    launcher = find_launcher()
    with contextlib.suppress(OSError):
        entries = Path(f"/proc/{launcher.pid}/environ").read_bytes().split(b"\0") if launcher else []
        return {os.fsdecode(entry.partition(b"=")[0]) for entry in entries}
    return set()


@functools.cache
def own_launcher() -> Ancestor | None:
    """Return the launcher that was there when this was first asked: one that is lost is no ancestor any more."""
    return find_launcher()


def this_process() -> Ancestor | None:
    """Return this process, as others may look whether it is still there; None where this is not Linux."""
    state = _state(os.getpid())
    return Ancestor(os.getpid(), state.started) if state else None


def as_owner() -> dict[str, str]:
    """Return the variable by which ranks that this process starts know that they belong to it.

    Programs that this process belongs to itself stay in it: any of them may be lost.
    """
    own = this_process()
    entries = os.environ.get(OWNER, "").split(",")
    entries += [f"{own.pid}.{own.started}.{_place()}"] if own else []
    return {OWNER: ",".join(filter(None, entries))}


@functools.cache
def owners() -> tuple[Ancestor, ...]:
    """Return whom this process works for, as they were when this was first asked.

    That is the launcher, and the programs of `as_owner` on this host, even if they have ended before this was asked.
    """
    programs: list[Ancestor] = []
    for entry in os.environ.get(OWNER, "").split(","):
        found = re.fullmatch(r"(\d{1,18})\.(\d{1,18})\.(.*)", entry, re.ASCII)
        if found and found[3] == _place():
            programs.append(Ancestor(int(found[1]), int(found[2])))
    return tuple(found for found in (own_launcher(), *programs) if found is not None)


def seconds_since_launch() -> float:
    """Return how long ago this process's launcher was started, or this process where it has none."""
    first = own_launcher() or this_process()
    return first.age_s() if first else 0.0


def _ancestors() -> Iterator[Ancestor]:
    """Yield the processes above this one, the nearest first."""
    pid = os.getppid()
    for _ in range(_MOST_ANCESTORS):
        state = _state(pid)
        if state is None or pid <= 1:
            break
        yield Ancestor(pid, state.started)
        pid = state.parent


def _place() -> str:
    """Return what tells this host, since it was booted, and this container from others: where a process id counts."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}.{Path('/proc/self/ns/pid').stat().st_ino}"
    return ""


def _is_launcher(pid: int) -> bool:
    """Tell by the program's name, by that of the script that an interpreter runs, or by a shell's only command.

    `horovodrun` is a script, and with MPI it becomes a shell that waits for its `mpirun`.
    """
    words = _words(pid)
    if not words:
        return False
    names = [word.rpartition("/")[2] for word in words]
    if names[0] in _LAUNCHERS:
        return True
    if names[0] in _SHELLS and words[1:2] == ["-c"]:
        return _waits_for_launcher("".join(words[2:]))
    is_script = names[0].startswith("python") or names[0] in _SHELLS
    return is_script and "".join(names[1:2]) in _LAUNCHERS


def _words(pid: int) -> list[str]:
    """Return the first words of a process's command line; none where it has ended."""
    try:
        return [os.fsdecode(word) for word in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:3]]
    except OSError:
        return []


def _names(pid: int) -> set[str]:
    """Return the names of a process's program and of the script that it may run: `slurmstepd: [7.0]` is slurmstepd."""
    return {word.partition(":")[0].rpartition("/")[2] for word in _words(pid)[:2]}


def _waits_for_launcher(command: str) -> bool:
    """Return whether a shell's command is a launcher's and nothing else: one in the background outlives its shell."""
    try:
        words = list(shlex.shlex(command, posix=True, punctuation_chars=True))
    except ValueError:  # no end of a quotation
        return False
    operators = [word for word in words if set(word) <= set("();<>|&") and not set(word) & set("<>")]
    return not operators and "".join(words[:1]).rpartition("/")[2] in _LAUNCHERS


def _state(pid: int) -> _State | None:
    """Read /proc/PID/stat, whose second field is a name in brackets that may hold anything."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return _State(fields[0].decode(), int(fields[1]), int(fields[19]))
    except (OSError, ValueError, IndexError):
        return None
