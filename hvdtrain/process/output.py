"""Standard output and error: they may know few signs, have no room or lose their reader. Standard library only."""

from __future__ import annotations

import contextlib
import io
import os
import select
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hvdtrain.errors import reason_of


def print_anything() -> None:
    """Have standard output take any sign: a locale may know fewer than what is printed (`±`, what a model writes)."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")


def tell(text: str) -> None:
    """Write a line to standard error, where that can be: to say something is never a condition of going on or ending.

    The stream may be closed, its disk full, its reader gone, or a signal's handler amid another line (RuntimeError).
    """
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


@contextlib.contextmanager
def silent_unless(talks: bool) -> Iterator[None]:
    """Print nothing within, unless it `talks`."""
    if talks:
        yield
        return
    with (
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def while_read(answer: Callable[[], int]) -> int:
    """Return what `answer` returns, an exit code; 0 where it was ended by a reader of standard output that has gone.

    Where standard output cannot be written for another reason, such as a full disk, that is said, and the code is not
    0. An error output that cannot be written ends nothing.
    """
    with _told_apart():
        try:
            code = answer()
            trouble = _trouble()
        except OSError as error:
            code, trouble = 0, error if is_of_output(error) else _trouble()
            if trouble is None:
                raise
    if trouble is None:
        return code
    with contextlib.suppress(OSError, ValueError):  # a stream in memory has no descriptor
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
    if isinstance(trouble, BrokenPipeError):
        return code
    tell(f"hvdtrain: {lost_words(trouble)}")
    return code or 1


def is_of_output(error: BaseException) -> bool:
    """Tell whether writing to standard output has raised this, in an answer of `while_read`."""
    return bool(getattr(error, "is_of_output", False))


def lost_words(error: BaseException) -> str:
    """Return what is said of an answer that standard output could not take."""
    if isinstance(error, BrokenPipeError):
        return "the reader of standard output has gone: the answer is broken off"
    reason = reason_of(error) if isinstance(error, Exception) else str(error)
    return f"standard output cannot be written ({reason}): the answer is not whole"


@contextlib.contextmanager
def _told_apart() -> Iterator[None]:
    """Have what standard output raises say where it is from, and standard error raise nothing."""
    out, err = sys.stdout, sys.stderr
    changed = [(out, name, _marked(getattr(out, name))) for name in ("write", "flush")]
    changed += [(err, name, _silent(getattr(err, name))) for name in ("write", "flush")]
    changed = [(stream, name, function) for stream, name, function in changed if isinstance(stream, io.TextIOWrapper)]
    for stream, name, function in changed:
        setattr(stream, name, function)
    try:
        yield
    finally:
        for stream, name, _ in changed:
            with contextlib.suppress(AttributeError):
                delattr(stream, name)


def _marked(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except OSError as error:
            error.is_of_output = True  # type: ignore[attr-defined]
            raise

    return call


def _silent(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        with contextlib.suppress(OSError):
            return function(*arguments)

    return call


def _trouble() -> OSError | None:
    """Return why standard output cannot be written: its reader has gone, as `head` does, or a disk has no room."""
    try:
        sys.stdout.flush()
        return BrokenPipeError() if _has_lost_reader(sys.stdout.fileno()) else None
    except (io.UnsupportedOperation, ValueError):  # a stream in memory, or one that was closed
        return None
    except OSError as error:
        return error


def _has_lost_reader(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))
