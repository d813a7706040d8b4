"""An end of the process that nobody would hear of: `os._exit(0)` in the midst of training. Standard library only."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import NoReturn

from hvdtrain.process.output import tell


@contextlib.contextmanager
def never_silent() -> Iterator[None]:
    """Say where the training's own code ends this process with exit code 0, which is that of a run that has finished.

    It ends with 1 then. Children that were forked end as they like.
    """
    original, pid = os._exit, os.getpid()

    def end(status: int) -> NoReturn:
        if status == 0 and os.getpid() == pid:
            tell(
                "hvdtrain: the training's own code has ended this process by os._exit(0), and the run has not"
                " finished: the same command with this --run-dir goes on"
            )
            status = 1
        original(status)

    os._exit = end
    try:
        yield
    finally:
        os._exit = original
