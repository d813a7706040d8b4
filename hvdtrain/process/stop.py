"""Requests to stop: signals, a budget of wall-clock time, a launcher that is gone. Standard library only.

Each rank notes its own requests here; the training loop makes all ranks agree on one step before any of them stops.
Before training there is nothing to save: then a signal ends the process at once, with the exit code that says "start
me again".
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any, NoReturn

from hvdtrain.errors import StopRequested
from hvdtrain.process.ancestors import owners, seconds_since_launch
from hvdtrain.process.forked import Original
from hvdtrain.process.output import tell

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
_SECONDS_FOR_INTERRUPT = 3.0
_SECONDS_BETWEEN_LOOKS = 1.0
_SECONDS_TO_END = 60.0
_SECONDS_FOR_THREADS = 10.0


class StopRequest:
    """Notes, while it is entered, the first request to stop. A second SIGINT is not noted: it interrupts at once.

    Python's own handlers do not run while the main thread waits inside Horovod; a thread reads the signals as well, and
    ends the process if the interrupt does not.

    Args:
        max_time_s: request a stop so many seconds after the launcher was started; None: never.
    """

    def __init__(self, max_time_s: float | None) -> None:
        self._original = Original()
        self._max_time_s = max_time_s
        self._deadline: float | None = None
        self._launcher = _Launcher()
        self._signal: signal.Signals | None = None
        self._signals = _Signals(self._note, _end_at_second_sigint)

    @property
    def reason(self) -> str | None:
        """Return why to stop, or None. Ends a child that was forked and trains on: it would write to the same files."""
        self._original.check()
        if self._signal is not None:
            return self._signal.name
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return "--train.max-time is used up"
        return "the launcher is gone" if self._launcher.is_gone() else None

    def __enter__(self) -> StopRequest:
        if self._max_time_s is not None:
            # What came before the first step, such as preparing data, is part of what a scheduler gives.
            self._deadline = time.monotonic() + self._max_time_s - seconds_since_launch()
        _Early.is_over = True
        _Early.num_requests += 1
        self._signals.take()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._signals.give_back()
        _Early.num_requests -= 1

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = self._signal or signal.Signals(number)


class StoppedEarly(SystemExit):
    """A signal came while there was nothing to save. No `Exception`, so that no library takes it for its own."""

    exit_code = StopRequested.exit_code

    def __init__(self, name: str) -> None:
        super().__init__(self.exit_code)
        self.name = name
        self.reason = f"stopped by {name}: nothing is lost, the same command begins where it would have begun"


def hear_all() -> None:
    """Undo what a program that has started this one may have left behind: it would change results in silence.

    Where SIGCHLD is ignored (some daemons do), every program that this one starts seems to end with 0. Signals that are
    blocked reach nobody: the run could be killed, and not be stopped. Does nothing outside of the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {*SIGNALS, signal.SIGCHLD})


def end_on_signals() -> None:
    """Raise `StoppedEarly` in the main thread where a signal comes before training, or where a verb does not train.

    While modules are imported the process ends at once instead. If the main thread is in a call that Python cannot
    interrupt, it ends a few seconds later all the same. It also ends where its launcher is lost before training.
    """
    owners()  # as early as can be
    _Early.is_watching = True
    _Signals(_raise_early, _end_after_early).take()


def end_without_launcher(grace_s: float = _SECONDS_TO_END) -> None:
    """Have a program of the user's own end once its launcher is gone: by SIGTERM, and after `grace_s` in any case.

    While it trains by `StopRequest`, and where `end_on_signals` watches, that is their business. Does nothing where
    nobody has started this process, or the second time.
    """
    if not _Early.is_watching and owners():
        _Early.is_watching = True
        threading.Thread(target=_end_with_launcher, args=(grace_s,), name="hvdtrain-launcher", daemon=True).start()


def _end_with_launcher(grace_s: float) -> None:
    launcher = _Launcher()
    while _Early.num_requests or not launcher.is_gone():
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    tell("hvdtrain: the launcher is gone: this rank ends")
    os.kill(os.getpid(), signal.SIGTERM)  # a handler of the program's own may save
    time.sleep(grace_s)  # it may have none, ignore it, or wait for other ranks, where handlers do not run
    os._exit(StopRequested.exit_code)


@contextlib.contextmanager
def leaving_by(leave: Callable[[str, int], NoReturn]) -> Iterator[None]:
    """Let a process that a signal must end from outside its main thread leave by `leave(reason, exit code)`."""
    before, _Leave.by = _Leave.by, leave
    try:
        yield
    finally:
        _Leave.by = before


class _Launcher:
    """Looks for this process's launcher, and for the program that has started it, about once a second."""

    def __init__(self) -> None:
        self._found = owners()
        self._looked = time.monotonic()
        self._is_gone = False

    def is_gone(self) -> bool:
        """Return whether one of them was there and has ended."""
        now = time.monotonic()
        if self._found and now - self._looked > _SECONDS_BETWEEN_LOOKS:
            self._looked, self._is_gone = now, not all(one.is_alive() for one in self._found)
        return self._is_gone


class _Signals:
    """The handlers of all signals that ask to stop, and a thread that reads the signals from a pipe as well.

    Args:
        note: the handler, in the main thread.
        watch: reads the numbers from this file descriptor in the thread, to its end.
    """

    def __init__(self, note: Callable[[int, FrameType | None], None], watch: Callable[[int], None]) -> None:
        self._note = note
        self._watch = watch
        self._before: dict[signal.Signals, Any] = {}
        self._write_end = -1
        self._wakeup_before = -1

    def take(self) -> None:
        """Handle signals from now on. One that nohup or a shell ignores on purpose stays ignored.

        Python lets the main thread alone do that: in another one, signals are the program's business.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._wakeup_before = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        ignored = [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else []
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS if number not in ignored}
        threading.Thread(target=self._watch, args=(read_end,), name="hvdtrain-stop", daemon=True).start()

    def give_back(self) -> None:
        """Leave signals to the handlers that were there before."""
        if self._write_end < 0:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._write_end)  # the thread reads the end of it, and ends


def _end_at_second_sigint(pipe: int) -> None:
    """Read the numbers of signals from `pipe` to its end; the second SIGINT ends the process, exit code 1."""
    interrupts = 0
    while numbers := os.read(pipe, 64):
        interrupts += numbers.count(signal.SIGINT)
        if interrupts > 1:
            time.sleep(_SECONDS_FOR_INTERRUPT)
            os._exit(1)
    os.close(pipe)


def _raise_early(number: int, frame: FrameType | None) -> None:
    for other in SIGNALS:  # one is enough: what ends the process is not to be interrupted
        signal.signal(other, signal.SIG_IGN)
    stop = StoppedEarly(signal.Signals(number).name)
    if _is_importing(frame):
        _Leave.by(f"hvdtrain: {stop.reason}", stop.exit_code)
    raise stop


def _is_importing(frame: FrameType | None) -> bool:
    """Return whether a module is being imported: C++ that imports Python (torch's) aborts the process if that fails."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _end_after_early(pipe: int) -> None:
    """End the process where the main thread has not been interrupted by a signal after some seconds.

    Or where nobody owns it any more: there is nothing to save.
    """
    launcher, main_ended, is_told = _Launcher(), math.inf, False
    while True:
        stop = ""
        if not threading.main_thread().is_alive():
            main_ended = min(main_ended, time.monotonic())
        if not is_told and time.monotonic() > main_ended + _SECONDS_FOR_THREADS:
            is_told = True
            _tell_of_threads()
        if select.select([pipe], [], [], _SECONDS_BETWEEN_LOOKS)[0]:
            numbers = os.read(pipe, 64)
            if not numbers:
                break
            stop = next((signal.Signals(number).name for number in numbers if number in SIGNALS), "")
            time.sleep(_SECONDS_FOR_INTERRUPT if stop else 0)
        elif launcher.is_gone() and not _Early.is_over:
            stop = "the loss of its launcher"
        if stop:
            _Leave.by(f"hvdtrain: {StoppedEarly(stop).reason}", StoppedEarly.exit_code)
    os.close(pipe)


def _tell_of_threads() -> None:
    """Say which threads of a user's keep a process that has done its work: Python waits for them, without a word."""
    names = [thread.name for thread in threading.enumerate() if not thread.daemon and thread.is_alive()]
    if names:
        tell(
            f"hvdtrain: all is done, but this process waits for {', '.join(map(repr, names[:8]))}, started as a"
            " thread without daemon=True, to end"
        )


def _leave_alone(reason: str, exit_code: int) -> NoReturn:
    tell(reason)
    os._exit(exit_code)


class _Early:
    is_over = False
    """Training has begun: from then on, a lost launcher is a request to save and stop."""
    num_requests = 0
    """Of those that are entered, which look for the launcher themselves."""
    is_watching = False
    """A thread looks for the launcher."""


class _Leave:
    by: Callable[[str, int], NoReturn] = staticmethod(_leave_alone)
