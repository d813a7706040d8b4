"""The lines that a file gains while others write it, perhaps on another machine."""

from __future__ import annotations

import os
from pathlib import Path

from hvdtrain.errors import reason_of

_SEEN = 64


class Tail:
    """Reads on where it stopped reading; a file that was replaced, cut or changed before that is read anew.

    Args:
        path: of the file, which need not be there yet.
        most_bytes: of what is read at a time; of what is there at first, the end.
    """

    def __init__(self, path: Path, most_bytes: int) -> None:
        self.path, self._most_bytes = path, most_bytes
        self.trouble = ""
        """Why it could not be read the last time."""
        self._key: tuple[int, int] | None = None
        self._place = 0
        self._seen = b""
        """What stands before that place."""
        self._partial = b""

    def read(self) -> tuple[list[bytes], bool]:
        """Return the whole lines that are new, without their ends, and whether they begin the file anew."""
        self.trouble = ""
        try:
            if not self.path.is_file():  # a pipe would be waited for
                return self._gone()
            with self.path.open("rb") as file:
                return self._read(file.fileno())
        except OSError as error:  # such as a handle that is stale: the server will know the file again
            self.trouble = reason_of(error)
            return [], False

    def _gone(self) -> tuple[list[bytes], bool]:
        was_there, self._key = self._key is not None, None
        if self.path.exists():
            self.trouble = "it is no regular file"
        return [], was_there

    def _read(self, file: int) -> tuple[list[bytes], bool]:
        status = os.fstat(file)
        key = (status.st_dev, status.st_ino)
        is_anew = key != self._key or not self._goes_on(file)
        if is_anew:
            self._key, self._seen, self._partial = key, b"", b""
            self._place = max(0, status.st_size - self._most_bytes)
        is_cut = is_anew and self._place > 0
        new = os.pread(file, min(self._most_bytes, status.st_size - self._place), self._place)
        self._place += len(new)
        self._seen = (self._seen + new)[-_SEEN:]
        *lines, self._partial = (self._partial + new)[-2 * self._most_bytes :].split(b"\n")
        return lines[1:] if is_cut else lines, is_anew

    def _goes_on(self, file: int) -> bool:
        """Return whether what was read last is still there: names of files come again, and copies are made in place."""
        return os.pread(file, len(self._seen), self._place - len(self._seen)) == self._seen
