"""Keep a run alive: start its launcher again after a failure, from the last good checkpoint. Standard library only.

    launch/supervise.sh --max-restarts 10 -- horovodrun -np 4 python -m hvdtrain train lm --run-dir runs/mine

Exit code 0 and 2 end it; 75 (stopped on request after saving) starts the command again at once; anything else after a
pause that grows. Whatever an attempt leaves behind is ended before the next one begins; so is a launcher that does not
return although its ranks are gone. Where the supervisor itself is killed, the ranks save and end. Where the command
names hosts, those that do not answer are left out, and the number of ranks is lowered to the slots that are left.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType

from hvdtrain.errors import ConfigError
from hvdtrain.process.ancestors import as_owner
from hvdtrain.process.hosts import lost_hosts, named_hosts, restricted, run_directory
from hvdtrain.process.marked import MARK, ask_to_stop, end_all, kill, marked_processes, ranks_among
from hvdtrain.process.run_files import named_checkpoint
from hvdtrain.process.session import session_folder

_STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
_LONGEST_PAUSE_S = 300.0
_SECONDS_BETWEEN_LOOKS = 1.0
# Stopped on request so often without a new checkpoint: the time that each attempt gets is too short for one.
_FRUITLESS_STOPS = 3
_STOPPED = 75


@dataclass
class Supervisor:
    """Runs a command until it has finished, or may not be started again."""

    command: list[str]
    max_restarts: int = 10
    """In a row without a new checkpoint."""
    pause_s: float = 5.0
    """Before the first restart."""
    restarts_after_stop: bool = True
    ssh: list[str] = field(default_factory=lambda: ["ssh"])
    """Command by which hosts are asked whether they are there."""
    patience_s: float = 60.0
    """How long a launcher may outlive the ranks on this host."""
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    _process: subprocess.Popen[bytes] | None = None
    _signals: int = 0
    _is_passed_on: bool = False

    def run(self) -> int:
        """Return the exit code of the last attempt, 1 for one that a signal ended."""
        run_dir, hosts = run_directory(self.command), named_hosts(self.command)
        failures, fruitless_stops = 0, 0
        with self._passing_signals_on():
            while True:
                before = named_checkpoint(run_dir)
                code = self._attempt_on(hosts)
                has_progressed = named_checkpoint(run_dir) != before
                if code in (0, 2) or self._signals:
                    return self._last_code(code)
                if code == _STOPPED:
                    fruitless_stops = 0 if has_progressed else fruitless_stops + 1
                    if not self.restarts_after_stop or fruitless_stops >= _FRUITLESS_STOPS:
                        _say("stopped on request; not started again")
                        return _STOPPED
                    _say("stopped on request and saved: it is started again")
                    continue
                failures = 1 if has_progressed else failures + 1
                if failures > self.max_restarts:
                    tried = f"{self.max_restarts} restarts without a new checkpoint"
                    _say(f"ended with exit code {code} after {tried}: giving up")
                    return _exit_code(code)
                self._pause(code, failures)
                if self._signals:
                    return self._last_code(code)

    def _last_code(self, code: int) -> int:
        """Return the exit code; 75 where the one signal found a process that had no handler for it yet."""
        is_by_signal = code < 0 or code > 128
        return _STOPPED if self._signals == 1 and is_by_signal else _exit_code(code)

    def _pause(self, code: int, failures: int) -> None:
        pause = min(self.pause_s * 2 ** min(failures - 1, 30), _LONGEST_PAUSE_S)
        _say(f"ended with exit code {code}; restart {failures} of {self.max_restarts} in {pause:g} s")
        deadline = time.monotonic() + pause
        while not self._signals and time.monotonic() < deadline:
            time.sleep(min(0.2, pause))

    def _attempt_on(self, hosts: dict[str, int]) -> int:
        """Run the command once on the hosts that answer; returns its exit code, 1 where none answers."""
        lost = lost_hosts(list(hosts), self.ssh) if hosts else set()
        if self._signals:
            _say("stopped on request while hosts were asked: nothing was started")
            return _STOPPED
        if lost and len(lost) == len(hosts):
            _say(f"no host answers ({', '.join(sorted(lost))})")
            return 1
        if lost:
            _say(f"without {', '.join(sorted(lost))}, which cannot be reached")
        return self._attempt(restricted(self.command, hosts, lost))

    def _attempt(self, command: list[str]) -> int:
        """Run the command once, in a session of its own, and end what it leaves behind."""
        with session_folder() as for_launcher:
            environ = {**for_launcher, **os.environ, MARK: self.mark, **as_owner()}
            try:
                self._process = subprocess.Popen(command, env=environ, start_new_session=True)
            except OSError as error:
                raise ConfigError(f"{command[0]} cannot be started: {error.strerror}") from error
            try:
                return self._wait(self._process)
            finally:
                self._process = None
                left = end_all(self.mark)
                if left:
                    _say(f"process {', '.join(map(str, left))} cannot be ended: the system does not let go of it")

    def _wait(self, process: subprocess.Popen[bytes]) -> int:
        """Return the launcher's exit code, 1 where it had to be ended because its ranks are gone."""
        ranks_seen: float | None = None
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(_SECONDS_BETWEEN_LOOKS)
            if self._signals and not self._is_passed_on:  # it came before there were ranks
                self._ask_to_stop()
            if ranks_among(marked_processes(self.mark)):
                ranks_seen = time.monotonic()
            elif ranks_seen is not None and time.monotonic() - ranks_seen > self.patience_s:
                _say(
                    f"the ranks on this host have been gone for {self.patience_s:g} s and the launcher is still there:"
                )
                _say("it waits for a host that is lost, and is ended")
                return 1

    @contextlib.contextmanager
    def _passing_signals_on(self) -> Iterator[None]:
        wanted = [number for number in _STOPS if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self._pass_on) for number in wanted}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        """Ask the run to stop; a second signal ends everything."""
        self._signals += 1
        if self._signals > 1:
            for pid in marked_processes(self.mark):
                kill(pid, signal.SIGKILL)
        else:
            self._ask_to_stop()

    def _ask_to_stop(self) -> None:
        """Ask one rank to stop, which suffices: all ranks agree."""
        if self._process is not None:
            self._is_passed_on = ask_to_stop(self.mark, self._process.pid, self.command)


def _exit_code(code: int) -> int:
    return code if code in (0, 1, 2, _STOPPED) else 1


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # a closed terminal is no reason to leave a run alone
        sys.stderr.write(f"supervise: {text}\n")
        sys.stderr.flush()


def _count(text: str) -> int:
    number = int(text)
    if not 0 <= number <= 10**6:
        raise ValueError(text)
    return number


def _seconds(text: str) -> float:
    number = float(text)
    if not (math.isfinite(number) and 0 <= number <= 10**6):
        raise ValueError(text)
    return number


def _words(text: str) -> list[str]:
    if not text.split():
        raise ValueError(text)
    return text.split()


_count.__name__, _seconds.__name__, _words.__name__ = "count (0 to 1,000,000)", "number of seconds", "command"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="launch/supervise.sh", description="Start a run again whenever it ends before it has finished."
    )
    parser.add_argument(
        "--max-restarts", type=_count, default=10, help="in a row without a new checkpoint (default 10)"
    )
    parser.add_argument(
        "--pause", type=_seconds, default=5.0, help="seconds before the first restart; doubles up to 300"
    )
    parser.add_argument("--no-restart-after-stop", action="store_true", help="let exit code 75 end it as well")
    parser.add_argument(
        "--ssh", type=_words, default=["ssh"], help="command by which hosts are asked whether they answer"
    )
    parser.add_argument(
        "--patience",
        type=_seconds,
        default=60.0,
        help="seconds that a launcher may outlive the ranks on this host (60)",
    )
    parser.add_argument(
        "command", nargs=argparse.REMAINDER, help="-- LAUNCHER ... python -m hvdtrain ... --run-dir DIR"
    )
    given = parser.parse_args(arguments)
    command = given.command[1:] if given.command[:1] == ["--"] else given.command
    if not command:
        parser.error("give the command after --")
    after_stop = not given.no_restart_after_stop
    supervisor = Supervisor(command, given.max_restarts, given.pause, after_stop, given.ssh, given.patience)
    try:
        return supervisor.run()
    except ConfigError as error:
        _say(str(error))
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
