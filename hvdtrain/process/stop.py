"""Requests to stop: signals, and a budget of wall-clock time. Standard library only.

Each rank notes its own requests here; the training loop makes all ranks agree on one step before any of them stops.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_SECONDS_FOR_INTERRUPT = 3.0


class StopRequest:
    """Notes, while it is entered, the first request to stop. A second SIGINT is not noted: it interrupts at once.

    Python's own handlers do not run while the main thread waits inside Horovod; a thread reads the signals as well, and
    ends the process if the interrupt does not.

    Args:
        max_time_s: request a stop after so many seconds; None: never.
    """

    def __init__(self, max_time_s: float | None) -> None:
        self._deadline = None if max_time_s is None else time.monotonic() + max_time_s
        self._signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._pipe = (-1, -1)
        self._wakeup_before = -1

    @property
    def reason(self) -> str | None:
        """Return why to stop, or None."""
        if self._signal is not None:
            return self._signal.name
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return "--train.max-time is used up"
        return None

    def __enter__(self) -> StopRequest:
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        self._wakeup_before = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        threading.Thread(target=_end_at_second_sigint, args=(self._pipe[0],), name="hvdtrain-stop", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._pipe[1])  # the thread reads the end of it, and ends

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = self._signal or signal.Signals(number)


def _end_at_second_sigint(pipe: int) -> None:
    """Read the numbers of signals from `pipe` to its end; the second SIGINT ends the process, exit code 1."""
    interrupts = 0
    while numbers := os.read(pipe, 64):
        interrupts += numbers.count(signal.SIGINT)
        if interrupts > 1:
            time.sleep(_SECONDS_FOR_INTERRUPT)
            os._exit(1)
    os.close(pipe)
