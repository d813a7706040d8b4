"""A child that the training's own code has forked, and that returns into the training. Standard library only.

It would write to the same files as its parent, and wait for ranks that know nothing of it. Children that do something
else and end, such as those of multiprocessing, never come here.
"""

from __future__ import annotations

import os

from hvdtrain.process.output import tell


class Original:
    """The process in which this was made."""

    def __init__(self) -> None:
        self._pid = os.getpid()

    def check(self) -> None:
        """End this process if it is another one."""
        if os.getpid() == self._pid:
            return
        tell(
            f"hvdtrain: process {os.getpid()}, which the training's own code has forked, would train on beside its"
            " parent, and is ended: let a child end by os._exit()"
        )
        os._exit(1)
