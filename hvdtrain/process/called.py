"""A rank that calls one function of a program which has started it: `python -m hvdtrain.process.called FOLDER`."""

from __future__ import annotations

import importlib
import pickle
import sys
import traceback
from pathlib import Path
from typing import Any

from hvdtrain.process.launch import prepare_process
from hvdtrain.process.stop import end_without_launcher
from hvdtrain.process.working_directory import search_last

CALL, RESULT, FAILURE = "call.pickle", "result-{}.pickle", "failure-{}.txt"


def main() -> int:
    """Call the function in the folder's file; leave its result, or its traceback, there."""
    search_last()
    launch = prepare_process()  # before torch starts
    end_without_launcher()
    folder = Path(sys.argv[1])
    try:
        sys.path[:] = pickle.loads((folder / "path.pickle").read_bytes())
        function, args, kwargs = pickle.loads((folder / CALL).read_bytes())
        result = function(*args, **kwargs)
    except BaseException as error:
        (folder / FAILURE.format(launch.rank)).write_text(_story(error), encoding="utf-8")
        raise
    try:
        raw = pickled(result)
    except Exception as error:  # as many types as there are objects
        (folder / FAILURE.format(launch.rank)).write_text(
            f"what the function returned, of type {type(result).__name__}, cannot be sent back ({error}): return"
            " numbers, texts, tensors, and lists and dictionaries of them",
            encoding="utf-8",
        )
        return 1
    (folder / RESULT.format(launch.rank)).write_bytes(raw)
    return 0


def pickled(value: Any) -> bytes:
    """Return a value as bytes; by cloudpickle, which comes with Horovod, also what a program itself defines.

    Raises:
        Exception: whatever pickling raises.
    """
    try:
        library = importlib.import_module("cloudpickle")
    except ImportError:
        library = pickle
    return bytes(library.dumps(value))


def _story(error: BaseException) -> str:
    """Return the traceback without what lies before the user's function."""
    own = error.__traceback__.tb_next if error.__traceback__ else None
    return "".join(traceback.format_exception(type(error), error, own))


if __name__ == "__main__":
    sys.exit(main())
