"""A sink that can do a run no harm: its calls run in a thread of its own."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from hvdtrain.process.tracebacks import sentence_of, stack_of
from hvdtrain.rundir.sinks.sink import Metrics, Samples, Sink

logger = logging.getLogger("hvdtrain")

MOST_WAITING = 10_000
"""Calls that may wait for a sink."""
SECONDS_OF_A_CALL = 120.0
"""That a sink may take to answer: W&B gives its server 90 to open a run."""
SECONDS_TO_CLOSE = 10.0
"""That a run which ends waits for a sink; whoever has asked it to stop gives it some 30 for everything."""


class Background:
    """Hands what it is given to another sink, in the order given, from a thread of its own.

    What raises, does not answer for long or falls far behind is told, once, and left out from then on: no tracker ends
    a run or holds it up. All calls of one sink are made by the same thread.

    Args:
        sink: what is called.
        say: takes what a person should know.
        most_waiting: calls that may wait for it.
        seconds_of_a_call: that it may take to answer.
        seconds_to_close: that `close` waits for it.
    """

    def __init__(
        self,
        sink: Sink,
        say: Callable[[str], None],
        *,
        most_waiting: int = MOST_WAITING,
        seconds_of_a_call: float = SECONDS_OF_A_CALL,
        seconds_to_close: float = SECONDS_TO_CLOSE,
    ) -> None:
        self._sink, self._say = sink, say
        self._name = type(sink).__name__
        self._seconds_of_a_call, self._seconds_to_close = seconds_of_a_call, seconds_to_close
        self._calls: queue.Queue[tuple[str, tuple[Any, ...]] | None] = queue.Queue(most_waiting)
        self._thread: threading.Thread | None = None
        self._called_at: float | None = None
        """When the call was made that it has not answered yet."""
        self._error: BaseException | None = None
        self._is_dropped = False
        self._closes_until: float | None = None
        if callable(getattr(sink, "show", None)):
            self.show = self._show

    def begin(self, step: int, num_steps: int) -> None:
        """Start the thread, and have the sink get ready."""
        self._thread = threading.Thread(target=self._serve, name=f"hvdtrain-{self._name}", daemon=True)
        self._thread.start()
        self._give("begin", step, num_steps)

    def write(self, step: int, metrics: Metrics, event: str | None) -> None:
        """Have it take the metrics of a step."""
        self._give("write", step, dict(metrics), event)

    def _show(self, step: int, samples: Samples) -> None:
        """Have it show what the model makes of held-out data."""
        self._give("show", step, dict(samples))

    def start_closing(self) -> None:
        """Have it finish, and do not wait: several can do so at once. One that was never begun is left as it is."""
        if self._thread is None or self._closes_until is not None:
            return
        self._closes_until = time.monotonic() + self._seconds_to_close
        self._give("close")
        with contextlib.suppress(queue.Full):
            self._calls.put_nowait(None)

    def close(self) -> None:
        """Have it finish, and wait for that a little."""
        self.start_closing()
        if self._thread is None or self._closes_until is None or self._is_dropped:
            return
        self._thread.join(max(0.0, self._closes_until - time.monotonic()))
        self._tell_of_error()
        if not self._is_dropped and self._thread.is_alive():
            self._drop(f"it has not finished within {self._seconds_to_close:g} s, and what it still holds may be lost")

    def _give(self, method: str, *arguments: Any) -> None:
        self._tell_of_error()
        called_at = self._called_at
        if not self._is_dropped and called_at is not None and time.monotonic() - called_at > self._seconds_of_a_call:
            self._drop(f"it has not answered for {self._seconds_of_a_call:g} s")
        if self._is_dropped or self._thread is None:
            return
        try:
            self._calls.put_nowait((method, arguments))
        except queue.Full:
            self._drop(f"it is {self._calls.maxsize:,} lines behind")

    def _tell_of_error(self) -> None:
        if self._error is not None and not self._is_dropped:
            self._drop(sentence_of(self._error))
            logger.info("%s", stack_of(self._error))

    def _drop(self, reason: str) -> None:
        self._is_dropped = True
        self.__dict__.pop("show", None)  # nobody makes samples for it any more
        self._say(f"WARNING: {self._name} gets no more metrics of this run: {reason}; training goes on without it")

    def _serve(self) -> None:
        while (call := self._calls.get()) is not None and not self._is_dropped:
            method, arguments = call
            self._called_at = time.monotonic()
            try:
                getattr(self._sink, method)(*arguments)
            except BaseException as error:  # of any kind, from code of others: no tracker is worth a run
                self._error = error
                if method != "close":
                    with contextlib.suppress(BaseException):  # one reason is enough
                        self._sink.close()
                return
            finally:
                self._called_at = None
