"""Ranks on this machine, started by a program or by `hvdtrain -np N`, and ended with it. Standard library only."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from hvdtrain.errors import ConfigError, HvdtrainError, LaunchError, StopRequested, reason_of
from hvdtrain.process.ancestors import as_owner
from hvdtrain.process.launch import detect_launch
from hvdtrain.process.marked import MARK, ask_to_stop, end_all, kill, marked_processes, ranks_among
from hvdtrain.process.output import tell
from hvdtrain.process.session import horovodrun_options, on_this_machine, session_folder
from hvdtrain.process.stray import stray_hint
from hvdtrain.process.working_directory import for_launcher, module_command

_STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
MOST_RANKS = 4096
_SECONDS_BETWEEN_LOOKS = 0.2
_SECONDS_FOR_OUTPUT = 5.0


def count_of_ranks(text: str) -> int:
    """Return the number after `-np`.

    Raises:
        ConfigError: it is none from 1 to 4096.
    """
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:9]) <= MOST_RANKS):
        raise ConfigError(f"-np {text[:40]}: give the number of ranks, from 1 to {MOST_RANKS}, as in -np 4")
    return int(text)


def command_of(ranks: int, program: Sequence[str]) -> list[str]:
    """Return the command that starts so many ranks of a program on this machine; one needs no launcher.

    Raises:
        LaunchError: this process is a rank itself, or Horovod is not installed.
    """
    refuse_as_rank()
    if ranks == 1:
        return list(program)
    beside = Path(sys.executable).with_name("horovodrun")
    horovodrun = str(beside) if beside.exists() else shutil.which("horovodrun")
    if horovodrun is None:
        raise LaunchError(
            f"{ranks} ranks need Horovod, which is not installed beside {sys.executable}: run hvdtrain setup"
        )
    _check_semaphores()
    return [horovodrun, *horovodrun_options(), "-np", str(ranks), *program]


def _check_semaphores() -> None:
    """Raise LaunchError where `horovodrun` would end in a traceback: it makes semaphores in shared memory."""
    try:
        multiprocessing.get_context("spawn").Semaphore()
    except OSError as error:
        raise LaunchError(
            f"horovodrun needs a /dev/shm that can be written ({reason_of(error)}): mount one, as by docker run --tmpfs"
            " /dev/shm, or start the ranks by mpirun -np N python -m hvdtrain ..."
        ) from error


def refuse_as_rank() -> None:
    """Raise LaunchError where this process, which is to start ranks, is one of several itself."""
    launch = detect_launch()
    if launch.is_parallel and not (launch.launcher == "srun" and launch.size == 1):  # which a shell of srun --pty is
        raise LaunchError(
            f"this is rank {launch.rank} of {launch.size} that {launch.launcher} has started: start ranks once only,"
            f" from outside of them{stray_hint(launch)}"
        )


def run_job(
    ranks: int,
    program: Sequence[str],
    output: Callable[[str], object] | None = None,
    timeout_s: float | None = None,
    *,
    starter: Sequence[str] | None = None,
    is_to_stop: Callable[[], bool] = lambda: False,
) -> int:
    """Run a program on so many ranks of this machine; returns its exit code, 1 where a signal has ended it.

    Signals are passed on to every rank, which may save and leave; a second one ends them at once. Nothing outlives the
    call; where this process is killed, the ranks save and end.

    Args:
        ranks: how many.
        program: the command of a rank.
        output: is given each line that the ranks print; None: they print where this process does.
        timeout_s: seconds after which they are ended; None: no limit.
        starter: another command that starts the ranks of the program behind it, however many it says.
        is_to_stop: asked now and then; once it says so the ranks are asked to save and leave, as by a signal.

    Raises:
        LaunchError: they cannot be started.
        TimeoutError: the time was over.
    """
    mark = uuid.uuid4().hex
    command = [*starter, *program] if starter is not None else command_of(ranks, program)
    with session_folder() as session:
        here = on_this_machine() if starter is None else {}
        safe = for_launcher(program)
        environ = {**session, **here, **os.environ, MARK: mark, **as_owner(), **path_to(sys.executable), **safe}
        process = _started(command, environ, is_read=output is not None)
        reader = _read_lines(process, output) if output else None
        requests = _Requests(mark, process.pid if command == [*program] else None)
        try:
            with _passing_signals_on(requests):
                code = _wait(process, timeout_s, requests, is_to_stop, lambda: ask_to_stop(mark, process.pid, command))
                if reader:  # a process that a rank has left behind may hold its output open
                    reader.join(_SECONDS_FOR_OUTPUT)
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(f"{ranks} ranks had not ended after {timeout_s:g} s, and were ended") from error
        except KeyboardInterrupt:  # of a program whose own handler raises it
            for pid in ranks_among(marked_processes(mark)) or ([process.pid] if command == [*program] else []):
                kill(pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
            raise
        finally:
            end_all(mark)
            process.wait()
        if reader:
            reader.join(_SECONDS_FOR_OUTPUT)
    _tell_signal(code, requests, output)
    if requests.is_early and code not in (0, 2):  # ranks that had no handler yet: nothing was begun, nothing is lost
        return StopRequested.exit_code
    return code if code >= 0 else 1


def _tell_signal(code: int, requests: _Requests, output: Callable[[str], object] | None) -> None:
    """Say which signal has ended what was started, where nobody here has sent one: it cannot say that itself."""
    if code >= 0 or requests.count:
        return
    name = signal.strsignal(-code) or "?"
    memory = ": that is what the kernel does where memory is used up" if -code == signal.SIGKILL else ""
    (output or sys.stderr.write)(f"hvdtrain: ended by signal {-code} ({name}){memory}\n")


def _wait(
    process: subprocess.Popen[str],
    timeout_s: float | None,
    requests: _Requests,
    is_to_stop: Callable[[], bool],
    ask: Callable[[], bool],
) -> int:
    """Return the exit code; asks to stop where that is wanted, again and again until a rank has been asked.

    Raises:
        subprocess.TimeoutExpired: the time was over.
    """
    deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s
    is_asked = False
    while True:
        left = deadline - time.monotonic()
        try:
            return process.wait(min(_SECONDS_BETWEEN_LOOKS, max(left, 0.0)))
        except subprocess.TimeoutExpired:
            if left <= 0:
                raise
        if requests.are_waiting:
            requests.pass_on()
        if not is_asked and is_to_stop():
            is_asked = ask()


def _started(command: list[str], environ: dict[str, str], is_read: bool) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE if is_read else None
    try:
        return subprocess.Popen(
            command,
            env=environ,
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=pipe,
            stderr=pipe and subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",  # a library of the ranks' may print any bytes
        )
    except (OSError, ValueError) as error:
        raise LaunchError(f"{command[0]} cannot be started: {reason_of(error)}") from error


def start_ranks(arguments: Sequence[str]) -> int:
    """Run `hvdtrain` on ranks of this machine; returns the exit code.

    How many is the first argument. Where `python` follows, what comes after it is a program of the user's own.
    """
    try:
        ranks = count_of_ranks(arguments[0] if arguments else "")
        is_own = len(arguments) > 2 and arguments[1] in ("python", "python3")
        program = [sys.executable, *arguments[2:]] if is_own else [*module_command("hvdtrain"), *arguments[1:]]
        return run_job(ranks, program)
    except HvdtrainError as error:
        tell(f"hvdtrain: {error}")
        return error.exit_code


def path_to(executable: str) -> dict[str, str]:
    """Return the PATH on which a launcher finds this Python's own programs, also where nothing is activated."""
    return {"PATH": os.pathsep.join([str(Path(executable).parent), os.environ.get("PATH", os.defpath)])}


def _read_lines(process: subprocess.Popen[str], output: Callable[[str], object]) -> threading.Thread:
    """Read what the ranks print to its end, whatever becomes of who is given it: a full pipe would hold them up."""

    def read() -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                with contextlib.suppress(Exception):  # an output that is closed, is full, or lacks a sign
                    output(line)

    reader = threading.Thread(target=read, name="hvdtrain-output", daemon=True)
    reader.start()
    return reader


@dataclass
class _Requests:
    """Signals that ask a job to stop, on their way to its ranks.

    A program that no launcher has started is `alone`: nothing but its process id tells that it is one.
    """

    mark: str
    alone: int | None
    count: int = 0
    is_early: bool = False
    """The first one came before there were ranks."""
    has_arrived: bool = False

    def take(self, number: int, frame: FrameType | None) -> None:
        """Pass the first one on, and end everything at the second."""
        self.count += 1
        if self.count == 1:
            self.pass_on()
            self.is_early = not self.has_arrived
        else:
            for pid in marked_processes(self.mark):
                kill(pid, signal.SIGKILL)

    def pass_on(self) -> None:
        """Ask every rank that there is; none, and it is to be done again."""
        ranks = ranks_among(marked_processes(self.mark)) or ([self.alone] if self.alone is not None else [])
        for pid in ranks:
            kill(pid, signal.SIGTERM)
        self.has_arrived = bool(ranks)

    @property
    def are_waiting(self) -> bool:
        """Return whether one came and could not be passed on yet."""
        return self.count == 1 and not self.has_arrived


@contextlib.contextmanager
def _passing_signals_on(requests: _Requests) -> Iterator[None]:
    """Pass signals on to the ranks, where this is a process of its own: in a notebook Ctrl-C means an exception."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    wanted = [number for number in _STOPS if signal.getsignal(number) is signal.SIG_DFL or _is_pythons(number)]
    before = {number: signal.signal(number, requests.take) for number in wanted}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_pythons(number: int) -> bool:
    return signal.getsignal(number) is signal.default_int_handler
