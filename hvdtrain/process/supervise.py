"""Keep a run alive: start its launcher again after a failure, from the last good checkpoint. Standard library only.

    launch/supervise.sh --max-restarts 10 -- horovodrun -np 4 python -m hvdtrain train lm --run-dir runs/mine

Exit code 0 and 2 end it; 75 (stopped on request after saving) starts the command again at once; anything else after a
pause that grows. Whatever an attempt leaves behind is ended before the next one begins. Where the command names hosts,
those that do not answer are left out, and the number of ranks is lowered to the slots that are left.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from hvdtrain.errors import ConfigError
from hvdtrain.process.run_files import named_checkpoint

MARK = "HVDTRAIN_SUPERVISED"
_HOSTS = ("-H", "--host", "--hosts", "-host")
_HOSTFILES = ("-hostfile", "--hostfile", "--host-file", "-machinefile", "--machinefile")
_RANKS = ("-np", "-n", "--np", "-c")
_LONGEST_PAUSE_S = 300.0
_SECONDS_TO_LEAVE = 10.0
# Stopped on request so often without a new checkpoint: the time that each attempt gets is too short for one.
_FRUITLESS_STOPS = 3


def restricted(command: Sequence[str], hosts: dict[str, int], lost: set[str]) -> list[str]:
    """Return the command without the lost hosts, its ranks no more than the slots that are left.

    A global batch size in the command must divide among the ranks; then it is the largest number that does.

    Args:
        command: the launcher's words.
        hosts: slots of each host that the command names.
        lost: those that do not answer.
    """
    left = {host: slots for host, slots in hosts.items() if host not in lost}
    words, slots = list(command), sum(left.values())
    place, _ = _option(words, (*_HOSTS, *_HOSTFILES))
    if not lost or place is None:
        return words
    words[place : place + 2] = ["-H", ",".join(f"{host}:{count}" for host, count in left.items())]
    number, asked = _option(words, _RANKS)
    ranks = min(slots, int(asked)) if asked and asked.isdigit() else slots
    _, batch = _option(words, ("--train.global-batch-size",))
    if batch and batch.isdigit():
        ranks = max(n for n in range(1, ranks + 1) if int(batch) % n == 0)
    if number is not None:
        words[number + 1] = str(ranks)
    return words


def named_hosts(command: Sequence[str]) -> dict[str, int]:
    """Return the hosts that a launcher's command names, with their slots (1 where none are given).

    Raises:
        ConfigError: a host file cannot be read.
    """
    _, listed = _option(command, _HOSTS)
    if listed:
        pairs = [entry.partition(":") for entry in listed.split(",")]
        return {host: int(slots) if slots.isdigit() else 1 for host, _, slots in pairs}
    _, file = _option(command, _HOSTFILES)
    if not file:
        return {}
    try:
        lines = Path(file).read_text().splitlines()
    except OSError as error:
        raise ConfigError(f"the host file {file} cannot be read: {error.strerror}") from error
    hosts = {}
    for line in lines:
        words = line.partition("#")[0].split()
        if words:
            slots = re.search(r"slots\s*=\s*(\d+)", line)
            host, _, count = words[0].partition(":")
            hosts[host] = int(slots.group(1)) if slots else int(count) if count.isdigit() else 1
    return hosts


def lost_hosts(hosts: Sequence[str], ssh: Sequence[str]) -> set[str]:
    """Return those that do not answer `ssh HOST true` within some seconds; this host itself is never asked."""
    here = {"localhost", "127.0.0.1", os.uname().nodename, os.uname().nodename.split(".")[0]}

    def answers(host: str) -> bool:
        command = [*ssh, "-o", "BatchMode=yes", "-o", "ConnectTimeout=5", host, "true"]
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=20).returncode == 0
        return False

    asked = [host for host in hosts if host not in here]
    with ThreadPoolExecutor(max_workers=32) as pool:
        return {host for host, ok in zip(asked, pool.map(answers, asked), strict=True) if not ok}


def run_directory(command: Sequence[str]) -> Path:
    """Return the command's --run-dir.

    Raises:
        ConfigError: it has none: each start would begin another run.
    """
    _, directory = _option(command, ("--run-dir",))
    if not directory:
        raise ConfigError("the command needs --run-dir DIR: without one, each start would begin a new run")
    return Path(directory)


def _option(words: Sequence[str], names: Sequence[str]) -> tuple[int | None, str | None]:
    """Return the place and the value of the first of some options, written `--name value` or `--name=value`."""
    for place, word in enumerate(words):
        name, is_joined, value = word.partition("=")
        if name in names and is_joined:
            return place, value
        if word in names and place + 1 < len(words):
            return place, words[place + 1]
    return None, None


@dataclass
class Supervisor:
    """Runs a command until it has finished, or may not be started again."""

    command: list[str]
    max_restarts: int
    pause_s: float
    restarts_after_stop: bool
    ssh: list[str]
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    _process: subprocess.Popen[bytes] | None = None
    _signals: int = 0

    def run(self) -> int:
        """Return the exit code of the last attempt, 1 for one that a signal ended."""
        run_dir, hosts = run_directory(self.command), named_hosts(self.command)
        failures, fruitless_stops = 0, 0
        with self._passing_signals_on():
            while True:
                command = self._fit_for(hosts)
                before = named_checkpoint(run_dir)
                code = self._attempt(command) if command else 1
                has_progressed = named_checkpoint(run_dir) != before
                if code in (0, 2) or self._signals:
                    return _exit_code(code)
                if code == 75:
                    fruitless_stops = 0 if has_progressed else fruitless_stops + 1
                    if not self.restarts_after_stop or fruitless_stops >= _FRUITLESS_STOPS:
                        _tell("stopped on request; not started again")
                        return 75
                    _tell("stopped on request and saved: it is started again")
                    continue
                failures = 1 if has_progressed else failures + 1
                if failures > self.max_restarts:
                    tried = f"{self.max_restarts} restarts without a new checkpoint"
                    _tell(f"ended with exit code {code} after {tried}: giving up")
                    return _exit_code(code)
                pause = min(self.pause_s * 2 ** (failures - 1), _LONGEST_PAUSE_S)
                _tell(f"ended with exit code {code}; restart {failures} of {self.max_restarts} in {pause:g} s")
                self._sleep(pause)
                if self._signals:
                    return _exit_code(code)

    def _fit_for(self, hosts: dict[str, int]) -> list[str]:
        """Return the command for the hosts that answer; nothing if none does."""
        lost = lost_hosts(list(hosts), self.ssh) if hosts else set()
        if lost and len(lost) == len(hosts):
            _tell(f"no host answers ({', '.join(sorted(lost))})")
            return []
        if lost:
            _tell(f"without {', '.join(sorted(lost))}, which cannot be reached")
        return restricted(self.command, hosts, lost)

    def _attempt(self, command: list[str]) -> int:
        """Run the command once, in a session of its own, and end what it leaves behind."""
        environ = {**os.environ, MARK: self.mark}
        try:
            self._process = subprocess.Popen(command, env=environ, start_new_session=True)
        except OSError as error:
            raise ConfigError(f"{command[0]} cannot be started: {error.strerror}") from error
        try:
            return self._process.wait()
        finally:
            self._process = None
            _end_all(lambda: marked_processes(self.mark))

    def _sleep(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not self._signals and time.monotonic() < deadline:
            time.sleep(min(0.2, seconds))

    @contextlib.contextmanager
    def _passing_signals_on(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._pass_on) for number in _STOPS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        """Ask one rank to stop, which suffices: all ranks agree. A second signal ends everything."""
        self._signals += 1
        processes = marked_processes(self.mark)
        if self._signals > 1:
            for pid in processes:
                _kill(pid, signal.SIGKILL)
            return
        ranks = [pid for pid in processes if b"\0-m\0hvdtrain\0" in _read(pid, "cmdline") and is_rank(pid)]
        if ranks:
            _kill(min(ranks), signal.SIGTERM)
        elif self._process is not None:  # the ranks are on other hosts: launchers but horovodrun pass SIGUSR1 on
            is_horovodrun = Path(self.command[0]).name == "horovodrun"
            _kill(self._process.pid, signal.SIGTERM if is_horovodrun else signal.SIGUSR1)


_STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def marked_processes(mark: str) -> list[int]:
    """Return the processes of this host that were started with our mark in their environment."""
    wanted = f"{MARK}={mark}".encode()
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    return [pid for pid in pids if wanted in _read(pid, "environ").split(b"\0") and pid != os.getpid()]


def is_rank(pid: int) -> bool:
    """Tell a rank from its launcher, whose command line holds the rank's."""
    return b"python" in _read(pid, "cmdline").split(b"\0")[0].rpartition(b"/")[2] and not any(
        word in _read(pid, "cmdline").split(b"\0")[1] for word in (b"horovodrun", b"mpirun")
    )


def _read(pid: int, name: str) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/{name}").read_bytes()
    return b""


def _kill(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _end_all(find: Callable[[], list[int]]) -> None:
    """End processes: asked first, killed after some seconds."""
    deadline = time.monotonic() + _SECONDS_TO_LEAVE
    for pid in find():
        _kill(pid, signal.SIGTERM)
    while left := find():
        if time.monotonic() > deadline:
            for pid in left:
                _kill(pid, signal.SIGKILL)
        time.sleep(0.1)


def _exit_code(code: int) -> int:
    return code if code in (0, 1, 2, 75) else 1


def _tell(text: str) -> None:
    sys.stderr.write(f"supervise: {text}\n")
    sys.stderr.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="launch/supervise.sh", description="Start a run again whenever it ends before it has finished."
    )
    parser.add_argument("--max-restarts", type=int, default=10, help="in a row without a new checkpoint (default 10)")
    parser.add_argument("--pause", type=float, default=5.0, help="seconds before the first restart; doubles up to 300")
    parser.add_argument("--no-restart-after-stop", action="store_true", help="let exit code 75 end it as well")
    parser.add_argument("--ssh", default="ssh", help="command by which hosts are asked whether they are there")
    parser.add_argument(
        "command", nargs=argparse.REMAINDER, help="-- LAUNCHER ... python -m hvdtrain ... --run-dir DIR"
    )
    given = parser.parse_args(arguments)
    command = given.command[1:] if given.command[:1] == ["--"] else given.command
    if not command:
        parser.error("give the command after --")
    after_stop = not given.no_restart_after_stop
    supervisor = Supervisor(command, given.max_restarts, given.pause, after_stop, given.ssh.split())
    try:
        return supervisor.run()
    except ConfigError as error:
        _tell(str(error))
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
