"""Which hosts a job may use: a script, a file, Slurm, PBS or the command itself lists them. Standard library only."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hvdtrain.errors import ConfigError, reason_of
from hvdtrain.process.hosts import check_name, read_bounded
from hvdtrain.process.launch import counts_of_nodes

_MOST_HOSTS = 65_536
_MOST_BYTES = 1 << 20
_SHOWN = 60
# Of what `sinfo` says of a node; one that drains still runs what it has.
_UNUSABLE = ("down", "fail", "unknown", "power", "reboot", "no_respond")


class NoListError(Exception):
    """The hosts could not be listed this time; another look may do better."""

    def __init__(self, reason: str, is_lasting: bool = False) -> None:
        super().__init__(reason)
        self.is_lasting = is_lasting
        """It cannot work as it was given, such as a script that is not there."""


class HostSource(ABC):
    """Where the hosts are listed."""

    name: str
    """As messages call it."""
    is_asking_hosts = True
    """Whether a host that is listed is asked, too, whether it answers."""

    @abstractmethod
    def look(self) -> dict[str, int]:
        """Return the slots of each host, at least one host with at least one slot, in the order of the list.

        Raises:
            NoListError: there is no list, or none that can be trusted.
        """

    def close(self) -> None:  # noqa: B027 - most sources have nothing to end
        """End what a look that still goes on has started."""


@dataclass
class _Program(HostSource):
    """A source that runs programs, for a limited time each."""

    timeout_s: float = field(default=20.0, kw_only=True)
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False, repr=False)

    def close(self) -> None:
        """Kill the program that runs."""
        process = self._process
        if process is not None:
            _kill_group(process)

    def _output_of(self, *command: str) -> str:
        """Return what a program prints. It goes to files: a child that is left behind would hold a pipe open."""
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            self._process = process = _started(command, out.fileno(), err.fileno())
            try:
                self._wait(process, out.fileno())
            finally:
                _kill_group(process)
                self._process = None
            if process.returncode:
                err.seek(max(0, os.fstat(err.fileno()).st_size - 4096))
                last = err.read().decode(errors="replace").strip().rpartition("\n")[2]
                said = f": {last[:200]}" if last else ""
                raise NoListError(f"{self.name} failed with exit code {process.returncode}{said}")
            out.seek(0)
            return out.read().decode(errors="replace")

    def _wait(self, process: subprocess.Popen[bytes], out: int) -> None:
        deadline = time.monotonic() + self.timeout_s
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.05)
            if os.fstat(out).st_size > _MOST_BYTES:
                raise NoListError(f"{self.name} prints more than 1 MiB, which is no list of hosts")
            if process.returncode is not None:
                return
            if time.monotonic() > deadline:
                raise NoListError(f"{self.name} did not end within {self.timeout_s:g} s")


@dataclass
class HostsScript(_Program):
    """A program that prints `host:slots`, one a line, as Horovod's host discovery scripts do."""

    command: list[str]
    slots: int = 1
    """Of a host that is printed without a number."""

    def __post_init__(self) -> None:
        self.name = f"the hosts script {self.command[0]}"

    def look(self) -> dict[str, int]:
        """Run it, and read what it prints."""
        return hosts_in(self._output_of(*self.command), self.slots, self.name)


@dataclass
class HostsFile(HostSource):
    """A file of the same lines, or of `host slots=N`, that is read again at every look."""

    path: Path
    slots: int = 1

    def __post_init__(self) -> None:
        self.name = f"the hosts file {self.path}"

    def look(self) -> dict[str, int]:
        """Read it."""
        try:
            text = read_bounded(self.path)
        except ConfigError as error:
            raise NoListError(str(error), is_lasting=not self.path.is_file()) from error
        return hosts_in(text, self.slots, self.name)


@dataclass
class NamedHosts(HostSource):
    """Hosts that the launcher's command names: always the same ones, of which some may not answer."""

    hosts: dict[str, int]
    name: str = "the command"

    def look(self) -> dict[str, int]:
        """Return them."""
        return _some(self.hosts, self.name)


@dataclass
class PbsHosts(HostSource):
    """The hosts of a PBS job: its node file names each as often as it has slots."""

    path: Path
    name: str = "PBS"

    def look(self) -> dict[str, int]:
        """Read the node file."""
        where = f"the node file {self.path}"
        try:
            hosts = Counter(line.split()[0] for line in read_bounded(self.path).splitlines() if line.split())
            for host in hosts:
                check_name(host, where)
        except ConfigError as error:
            raise NoListError(str(error)) from error
        return _some(hosts, where)


@dataclass
class SlurmHosts(_Program):
    """The nodes that a Slurm job has now and that Slurm finds usable."""

    job: str
    nodes: str
    """Slurm's expression for them when the job began, such as `node[1-3]`."""
    tasks_per_node: str
    """Slurm's list of how many tasks each of them takes, such as `2(x3)`."""
    name: str = "Slurm"
    is_asking_hosts = False  # ssh to a node may be forbidden, and Slurm itself knows
    _slots: dict[str, int] = field(default_factory=dict, init=False, repr=False)

    def look(self) -> dict[str, int]:
        """Ask `squeue` for the job's nodes and `sinfo` for their states."""
        if not self._slots:
            counts = counts_of_nodes(self.tasks_per_node) or [1]
            self._slots = {name: counts[min(i, len(counts) - 1)] for i, name in enumerate(self._names(self.nodes))}
        nodes = self._output_of("squeue", "-h", "-j", self.job, "-o", "%N").strip() or self.nodes
        lines = self._output_of("sinfo", "-h", "-N", "-n", nodes, "-o", "%N %T").splitlines()
        states = dict(line.split(None, 1) for line in lines if len(line.split()) == 2)
        usable = [name for name in self._names(nodes) if not _is_unusable(states.get(name, "unknown"))]
        most = max(self._slots.values(), default=1)
        return _some({name: self._slots.get(name, most) for name in usable}, self.name)

    def _names(self, nodes: str) -> list[str]:
        return self._output_of("scontrol", "show", "hostnames", nodes).split()


def scheduler_hosts(environ: Mapping[str, str] = os.environ) -> HostSource | None:
    """Return the list of the Slurm or PBS job that this process is in; None where it is in none."""
    if environ.get("SLURM_JOB_ID") and environ.get("SLURM_JOB_NODELIST"):
        tasks = environ.get("SLURM_TASKS_PER_NODE", "")
        return SlurmHosts(environ["SLURM_JOB_ID"], environ["SLURM_JOB_NODELIST"], tasks)
    if environ.get("PBS_NODEFILE"):
        return PbsHosts(Path(environ["PBS_NODEFILE"]))
    return None


def hosts_in(text: str, slots: int, where: str) -> dict[str, int]:
    """Return the hosts of lines `host`, `host:slots` or `host slots=N`; what follows a # is a comment.

    A host that is listed twice is one host, and its last number holds; one without slots is left out.

    Args:
        text: the lines.
        slots: of a host without a number.
        where: as messages call it.

    Raises:
        NoListError: a line is none of these, or no host is left: then nothing of it is to be trusted.
    """
    hosts: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        found = re.fullmatch(r"(\[[0-9A-Fa-f:.%]+\]|[^\s:]+)(?::([0-9]+))?((?:\s+[\w-]+\s*=\s*\S+)*)", line)
        options = dict(re.findall(r"([\w-]+)\s*=\s*(\S+)", found[3])) if found else {}
        count = options.get("slots") or (found and found[2]) or str(slots)
        if found is None or not re.fullmatch(r"[0-9]{1,6}", count):
            raise NoListError(f"{where} says {line[:_SHOWN]!r} in line {number}, which is no host:slots")
        try:
            check_name(found[1], where)
        except ConfigError as error:
            raise NoListError(str(error)) from error
        hosts[found[1]] = int(count)
    if len(hosts) > _MOST_HOSTS:
        raise NoListError(f"{where} lists more than {_MOST_HOSTS:,} hosts")
    return _some(hosts, where)


def _some(hosts: Mapping[str, int], where: str) -> dict[str, int]:
    """Return those with slots. A list without any is rather a fault of who made it than the end of all hosts."""
    left = {host: slots for host, slots in hosts.items() if slots > 0}
    if not left:
        raise NoListError(f"{where} lists no host{' with slots' if hosts else ''}")
    return left


def _is_unusable(state: str) -> bool:
    """Tell by `sinfo`'s word for a node's state; a `*` behind it means that the node does not respond."""
    return state.endswith("*") or any(word in state.lower() for word in _UNUSABLE)


def _started(command: Sequence[str], out: int, err: int) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True)
    except (OSError, ValueError) as error:
        reason = reason_of(error)
        raise NoListError(f"{command[0]} cannot be started: {reason}", is_lasting=True) from error


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """End a program that has not ended, with what it has started."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
