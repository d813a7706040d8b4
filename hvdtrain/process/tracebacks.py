"""What an exception in a user's own code looks like: one sentence that names his line, then his part of the stack.

hvdtrain's frames around it say nothing to him, and are left out. An exception that has passed no code of a user is
hvdtrain's own, or a library's: its stack stays whole.
"""

from __future__ import annotations

import contextlib
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path

_OWN = Path(__file__).absolute().parents[1]
_INSTALLED = tuple({Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
_LONGEST_SENTENCE = 500


def sentence_of(error: BaseException) -> str:
    """Return type, message and place of an exception on one line."""
    words = _message_of(error)
    words = words if len(words) <= _LONGEST_SENTENCE else f"{words[:_LONGEST_SENTENCE]} ..."
    what = f"{type(error).__name__}: {words}" if words else type(error).__name__
    read = next((f"reading sample {link.users_sample}" for link in _chain(error) if hasattr(link, "users_sample")), "")
    where = ", ".join(filter(None, (place_of(error), read)))
    return f"{what} ({where})" if where else what


def _message_of(error: BaseException) -> str:
    """Return an exception's own words on one line; a class of a user's may fail to say them."""
    try:
        return " ".join(str(error).split())
    except Exception as failed:
        return f"its message cannot be shown, since that raises {type(failed).__name__}"


@contextlib.contextmanager
def reading(sample: int) -> Iterator[None]:
    """Have an exception know which sample of a user's data was read, for `sentence_of`."""
    try:
        yield
    except Exception as error:
        with contextlib.suppress(AttributeError, TypeError):  # a class that takes no attributes
            error.users_sample = sample  # type: ignore[attr-defined]
        raise


def place_of(error: BaseException) -> str:
    """Return where in a user's code an exception was raised, or that code has called what raised it; "" if nowhere."""
    for link in _chain(error):
        frames = [frame for frame in traceback.extract_tb(link.__traceback__) if _is_users(frame.filename)]
        if frames:
            last = frames[-1]
            function = "" if last.name == "<module>" else f", in {last.name}"
            return f"{shown(last.filename)}, line {last.lineno}{function}"
        if told := getattr(link, "users_place", ""):
            return str(told)
    return ""


def stack_of(error: BaseException) -> str:
    """Return the traceback of an exception, and of those that led to it, from the first line of a user's code on."""
    told = traceback.TracebackException.from_exception(error)
    is_users = place_of(error) != ""
    todo: list[traceback.TracebackException | None] = [told]
    while todo:
        link = todo.pop()
        if link is not None:
            first = next((i for i, frame in enumerate(link.stack) if _is_users(frame.filename)), None)
            if first is None:  # raised in a data worker, and here once more
                first = len(link.stack) if is_users else 0
            link.stack[:] = [frame for frame in link.stack[first:] if not _is_wrapper(frame)]
            todo += [link.__cause__, link.__context__]
    return "".join(told.format())


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and all(link is not other for other in seen):  # a class may be equal to everything
        seen.append(link)
        yield link
        link = link.__cause__ or link.__context__


def _is_users(filename: str) -> bool:
    """Tell whether a file is neither hvdtrain's nor installed, nor no file at all."""
    if filename.startswith("<"):
        return False
    path = Path(filename).absolute()
    return not any(path.is_relative_to(folder) for folder in (_OWN, *_INSTALLED))


def _is_wrapper(frame: traceback.FrameSummary) -> bool:
    """Tell whether a frame only stands between a user's call of a torch function and that function."""
    return frame.name == "__torch_function__" and Path(frame.filename).absolute().is_relative_to(_OWN)


def shown(filename: str) -> str:
    """Return a path as the user knows it: from where he is, if it lies below."""
    try:
        path, here = Path(filename).absolute(), Path.cwd()
    except OSError:  # the working directory was deleted
        return filename
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
