"""Starts a launcher again and again, until its run has finished or may not be started again. Standard library only."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from hvdtrain.errors import ConfigError, counted, reason_of
from hvdtrain.process.ancestors import as_owner
from hvdtrain.process.aside import accused_hosts, sizes_of_logs
from hvdtrain.process.guard import guarding
from hvdtrain.process.hosts import run_directory
from hvdtrain.process.job import path_to
from hvdtrain.process.marked import MARK, ask_to_stop, end_all, kill, marked_processes, ranks_among
from hvdtrain.process.members import Change, Members
from hvdtrain.process.output import tell
from hvdtrain.process.placement import Placement, placed
from hvdtrain.process.run_files import holder_of, lacks_its_end, named_checkpoint
from hvdtrain.process.session import session_folder

_STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
_LONGEST_PAUSE_S = 300.0
_SECONDS_BETWEEN_LOOKS = 0.5
# A rank on a host that cannot be reached holds the run's directory until it has noticed itself.
_SECONDS_FOR_THE_LOCK = 900.0
# Stopped on request so often without a new checkpoint: the time that each attempt gets is too short for one.
_FRUITLESS_STOPS = 3
_MOST_DOUBTS = 3
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
    patience_s: float = 60.0
    """How long a launcher may outlive the ranks on this host."""
    grace_s: float = 60.0
    """How long a run may take to save and stop where a host that still answers is to leave."""
    members: Members | None = None
    """Which hosts it has; None: that is the command's own business."""
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    _process: subprocess.Popen[bytes] | None = None
    _words: list[str] = field(default_factory=list)
    """Of the launcher that runs."""
    _signals: int = 0
    _is_passed_on: bool = False
    _change: Change | None = None
    """Why we have ended the attempt ourselves, or asked it to end."""
    _is_asked: bool = False
    _doubts: int = 0
    """Times in a row that the launcher returned 0 for a run that had not finished."""
    _deadline: float = 0.0

    def run(self) -> int:
        """Return the exit code of the last attempt, 1 for one that a signal ended.

        Raises:
            ConfigError: the command cannot be started, or the hosts cannot be listed.
            TimeoutError: there were too few hosts for too long.
        """
        run_dir = run_directory(self.command)
        failures, fruitless_stops = 0, 0
        with self._passing_signals_on(), self._looking_out():
            while True:
                command = self._next_command()
                if self._signals:
                    say("stopped on request while hosts were asked: nothing was started")
                    return _STOPPED
                before, logs = named_checkpoint(run_dir), sizes_of_logs(run_dir)
                code = self._attempt(command)
                has_progressed = named_checkpoint(run_dir) != before
                code = self._checked(code, run_dir, has_progressed)
                if code in (0, 2) or self._signals:
                    return self._last_code(code)
                is_stop = code == _STOPPED or (self._change is not None and self._change.is_saving and has_progressed)
                if is_stop and self._change is None:
                    fruitless_stops = 0 if has_progressed else fruitless_stops + 1
                    if not self.restarts_after_stop or fruitless_stops >= _FRUITLESS_STOPS:
                        say("stopped on request; not started again")
                        return _STOPPED
                    say("stopped on request and saved: it is started again")
                is_known = self._note_end(run_dir, logs, not is_stop, has_progressed)
                if is_stop:
                    continue
                failures = 1 if has_progressed else failures + 1
                if failures > self.max_restarts:
                    tried = f"{counted(self.max_restarts, 'restart')} without a new checkpoint"
                    say(f"ended with exit code {code} after {tried}: giving up")
                    return _exit_code(code)
                self._pause(code, failures, 0.0 if is_known else self.pause_s)
                self._wait_for_directory(run_dir)
                if self._signals:
                    say("stopped on request before it was started again")
                    return _STOPPED

    def _checked(self, code: int, run_dir: Path, has_progressed: bool) -> int:
        """Return the exit code, 1 where it says that a run has finished and the run's metrics do not.

        Open MPI 5's mpirun returns 0 when it has lost a host. Metrics may lack their end for other reasons, such as a
        full disk: then it is believed at last.
        """
        if code == 0 and not self._signals and not run_dir.exists():  # a wrapper that starts nothing
            say(f"the command returned 0, and there is no run in {run_dir}")
        self._doubts = 0 if code or has_progressed else self._doubts
        if code or self._signals or self._doubts >= _MOST_DOUBTS or not lacks_its_end(run_dir):
            return code
        self._doubts += 1
        say("the launcher returned 0, but the run has not finished")
        return 1

    def _last_code(self, code: int) -> int:
        """Return the exit code; 75 where the one signal found a process that had no handler for it yet."""
        is_by_signal = code < 0 or code > 128
        return _STOPPED if self._signals == 1 and is_by_signal else _exit_code(code)

    def _next_command(self) -> list[str]:
        """Return the command of the next attempt: once there are hosts enough, if hosts are ours to choose."""
        if self.members is None:
            return self.command
        placement: Placement | None = self.members.place_next(lambda: self._signals > 0)
        return placed(self.command, placement) if placement else self.command

    def _note_end(self, run_dir: Path, logs: Mapping[Path, int], has_failed: bool, has_progressed: bool) -> bool:
        """Let hosts be blamed; returns whether it is known why the attempt failed, and another can begin at once."""
        if self.members is None:
            return False
        is_ours = self._change is not None
        placement = self.members.placement
        accused = accused_hosts(run_dir, logs, placement.hosts) if placement and has_failed and not is_ours else set()
        return self.members.note_end(has_failed and not is_ours, has_progressed, accused) or is_ours

    def _pause(self, code: int, failures: int, first_s: float) -> None:
        pause = min(first_s * 2 ** min(failures - 1, 30), _LONGEST_PAUSE_S)
        when = f"in {pause:g} s" if pause else "at once"
        say(f"ended with exit code {code}; restart {failures} of {self.max_restarts} {when}")
        deadline = time.monotonic() + pause
        while not self._signals and time.monotonic() < deadline:
            time.sleep(min(0.2, pause))

    def _wait_for_directory(self, run_dir: Path) -> None:
        """Wait while ranks that this host cannot reach hold the run's directory: two runs would write to it."""
        deadline, has_said = time.monotonic() + _SECONDS_FOR_THE_LOCK, False
        while not self._signals and time.monotonic() < deadline:
            holder = holder_of(run_dir)
            if not holder:
                return
            if not has_said:
                say(f"waiting for {holder}, which still holds {run_dir}: it ends once it has missed the others")
                has_said = True
            time.sleep(0.5)

    def _attempt(self, command: list[str]) -> int:
        """Run the command once, in a session of its own, and end what it leaves behind."""
        self._words, self._change = command, None
        with session_folder() as for_launcher:
            environ = {**for_launcher, **os.environ, MARK: self.mark, **as_owner()}
            if command[0] != self.command[0]:  # horovodrun, which we have found ourselves, finds its mpirun beside it
                environ |= path_to(sys.executable)
            try:
                self._process = subprocess.Popen(command, env=environ, start_new_session=True)
            except OSError as error:
                raise ConfigError(f"{command[0]} cannot be started: {reason_of(error)}") from error
            with guarding(self.mark, self._process.pid, command) if self.members else contextlib.nullcontext():
                try:
                    return self._wait(self._process)
                finally:
                    self._process = None
                    left = end_all(self.mark)
                    if left:
                        what = "process" if len(left) == 1 else "processes"
                        say(f"{what} {', '.join(map(str, left))} cannot be ended: the system does not let go")

    def _wait(self, process: subprocess.Popen[bytes]) -> int:
        """Return the launcher's exit code, 1 where it had to be ended because its ranks or its hosts are gone."""
        ranks_seen: float | None = None
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(_SECONDS_BETWEEN_LOOKS)
            if self._signals and not self._is_passed_on:  # it came before there were ranks
                self._ask_to_stop()
            if self._is_to_end():
                return 1
            if ranks_among(marked_processes(self.mark)):
                ranks_seen = time.monotonic()
            elif ranks_seen is not None and time.monotonic() - ranks_seen > self.patience_s:
                say(f"the ranks on this host have been gone for {self.patience_s:g} s and the launcher is still there:")
                say("it waits for a host that is lost, and is ended")
                return 1

    def _is_to_end(self) -> bool:
        """Return whether the attempt is to be ended now, because its hosts have changed; asks it to stop before."""
        if self.members is None or self._signals:
            return False
        if self._change is None:
            self._change = self.members.change()
            if self._change is None:
                return False
            self._is_asked, self._deadline = False, time.monotonic() + self.grace_s
            what = "asked to save and stop" if self._change.is_saving else "ended"
            say(f"{self._change.reason}: the run is {what}")
        if not self._change.is_saving:
            return True
        if not self._is_asked and self._process is not None:
            self._is_asked = ask_to_stop(self.mark, self._process.pid, self._words)
        if self._change.may_take_long or time.monotonic() < self._deadline:
            return False
        say(f"the run has not stopped within {self.grace_s:g} s, and is ended")
        return True

    @contextlib.contextmanager
    def _looking_out(self) -> Iterator[None]:
        """Look for hosts meanwhile; SIGUSR2 asks the run to grow, and without hosts to grow to does not end us."""
        members = self.members
        grow = members.ask_to_grow if members else lambda: say("SIGUSR2 lets a run grow, but nothing lists hosts here")
        before = signal.signal(signal.SIGUSR2, lambda number, frame: grow())
        if members:
            members.lookout.start()
        try:
            yield
        finally:
            if members:
                members.lookout.close()
            signal.signal(signal.SIGUSR2, before)

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
            self._is_passed_on = ask_to_stop(self.mark, self._process.pid, self._words)


def _exit_code(code: int) -> int:
    return code if code in (0, 1, 2, _STOPPED) else 1


def say(text: str) -> None:
    """Print a line for a person."""
    tell(f"supervise: {text}")  # a closed terminal is no reason to leave a run alone
