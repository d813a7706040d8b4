"""A file that text is added to, and that waits where a disk is full."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


class PatientFile:
    """Appends text to a file; what cannot be written now is kept and written the next time.

    Args:
        path: the file; it is made with the first text.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = -1
        self._waiting = b""

    @property
    def is_waiting(self) -> bool:
        """Return whether there is text that is not in the file yet."""
        return bool(self._waiting)

    def append(self, text: str) -> None:
        """Add text, after what is still waiting.

        Raises:
            OSError: the file cannot be written now; the text is kept.
        """
        self._waiting += text.encode("utf-8", "backslashreplace")  # names of files that are not UTF-8
        if self._descriptor >= 0 and os.fstat(self._descriptor).st_nlink == 0:  # removed: nobody would read it
            os.close(self._descriptor)
            self._descriptor = -1
        if self._descriptor < 0:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK  # a pipe is not waited for
            self._descriptor = os.open(self._path, flags, 0o666)
        while self._waiting:
            written = os.write(self._descriptor, self._waiting)
            self._waiting = self._waiting[written:]

    def close(self) -> None:
        """Try once more to write what is waiting, and close the file."""
        with contextlib.suppress(OSError):
            if self._waiting:
                self.append("")
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
