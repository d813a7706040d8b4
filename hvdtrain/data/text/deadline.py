"""A limit to how long code of a stranger's may run in this thread: a template of a tokenizer is a program."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterator


class _TooLong(BaseException):
    """Raised from outside; no `Exception`, so that the code does not take it for one of its own."""


@contextlib.contextmanager
def at_most(seconds: float, error: Exception) -> Iterator[None]:
    """Raise `error` where the body runs Python code for longer than that. Signals and other threads are not touched."""
    thread, lock, is_over = threading.get_ident(), threading.Lock(), False

    def interrupt() -> None:
        with lock:
            if not is_over:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(_TooLong))

    timer = threading.Timer(seconds, interrupt)
    timer.daemon = True
    timer.start()
    try:
        try:
            yield
        finally:
            with lock:  # from here on nothing comes from outside any more
                is_over = True
    except _TooLong:
        raise error from None
    finally:
        timer.cancel()
