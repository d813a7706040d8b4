"""Ranks for one function of a program or a notebook."""

from __future__ import annotations

import pickle
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from hvdtrain.errors import ConfigError, LaunchError
from hvdtrain.process.called import CALL, FAILURE, RESULT, pickled
from hvdtrain.process.job import MOST_RANKS, run_job
from hvdtrain.process.working_directory import module_command

T = TypeVar("T")


def launch(
    function: Callable[..., T], *args: Any, ranks: int, timeout_s: float | None = None, **kwargs: Any
) -> list[T]:
    """Call a function on several ranks of this machine; returns what each returned, rank 0's first.

    Each rank is a new process, in which the function calls `hvdtrain.init()` or `hvdtrain.train(...)`. What ranks print
    is printed here. The function may be one of a notebook; what it uses of the program's variables is copied.

        def work(steps):
            return hvdtrain.train("lm", train={"steps": steps}).metrics

        hvdtrain.launch(work, 100, ranks=4)

    Args:
        function: what every rank calls.
        args: for it; these, what it returns and `kwargs` must pickle.
        ranks: how many.
        timeout_s: seconds after which they are ended; None: no limit.
        kwargs: for it.

    Raises:
        ConfigError: no number of ranks, or a function that cannot be sent.
        LaunchError: a rank has failed, with its traceback; or Horovod is not installed.
        TimeoutError: the time was over.
    """
    if type(ranks) is not int or not 1 <= ranks <= MOST_RANKS:
        raise ConfigError(f"ranks={ranks!r} must be a whole number from 1 to {MOST_RANKS}")
    if not callable(function):
        raise ConfigError(f"launch() calls a function on every rank, not an object of type {type(function).__name__}")
    with tempfile.TemporaryDirectory(prefix="hvdtrain-") as name:
        folder = Path(name)
        (folder / CALL).write_bytes(_pickled((function, args, kwargs)))
        (folder / "path.pickle").write_bytes(
            pickle.dumps([str(Path.cwd()) if entry == "" else entry for entry in sys.path])
        )
        program = [*module_command("hvdtrain.process.called"), name]
        code = run_job(ranks, program, sys.stdout.write, timeout_s)
        failures = sorted(folder.glob(FAILURE.format("*")), key=lambda path: path.stat().st_mtime_ns)
        if failures:
            rank = failures[0].stem.partition("-")[2]
            story = failures[0].read_text(encoding="utf-8").rstrip()
            raise LaunchError(f"rank {rank} of {ranks} has failed:\n{story}")
        results = [folder / RESULT.format(rank) for rank in range(ranks)]
        if code or not all(path.exists() for path in results):
            raise LaunchError(f"the ranks ended with exit code {code}; what they printed says why")
        return [pickle.loads(path.read_bytes()) for path in results]


def _pickled(call: Any) -> bytes:
    try:
        return pickled(call)
    except Exception as error:  # as many types as there are objects
        raise ConfigError(f"the function, or what it uses, cannot be sent to other processes: {error}") from error
