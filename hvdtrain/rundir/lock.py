"""One run at a time in a directory, and no directory left behind by a run that was refused."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from hvdtrain.errors import ConfigError, ResumeError, reason_of

_MOST_SHOWN = 256


@dataclass
class Claim:
    """A run directory that this process holds until `release`, or until it dies."""

    folder: Path
    file: TextIO
    made: list[Path]
    """Directories that were made for it, outermost first."""

    def release(self) -> None:
        """Let other runs have the directory."""
        self.file.close()

    def undo(self) -> None:
        """Release it, and remove it if it was made for a run that never began. Files that others wrote stay."""
        if self.folder in self.made:
            logs = self.folder / "logs"
            for path in [*logs.glob("rank-*.log"), self.folder / "lock"]:
                path.unlink(missing_ok=True)
            for path in [logs, *reversed(self.made)]:
                with contextlib.suppress(OSError):
                    path.rmdir()
        self.release()


def claim(folder: Path) -> Claim:
    """Make a run directory and lock it. The manifests in it may be read once it is locked, not before.

    A POSIX lock: the system frees it when its holder dies, and network file systems carry it between hosts.

    Raises:
        ResumeError: another run holds it.
        ConfigError: the directory cannot be made, or written to.
    """
    made: list[Path] | None = None
    try:
        made = _make(folder)
        path = folder / "lock"
        if path.exists() and not path.is_file():
            raise ConfigError(f"{path} is no regular file: remove it, or choose another --run-dir")
        file = path.open("a+", encoding="utf-8", errors="replace")
    except (OSError, ValueError) as error:
        what = "made" if made is None else "written to"
        raise ConfigError(f"{folder} cannot be {what} ({reason_of(error)}): choose another --run-dir") from error
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return Claim(folder, file, made)  # a file system without locks: nothing can be known
        file.seek(0)
        holder = file.read(_MOST_SHOWN).strip()
        file.close()
        raise ResumeError(
            f"another run is training in {folder} ({holder}): wait for it to end, or choose another --run-dir"
        ) from error
    with contextlib.suppress(OSError):  # a disk that is full has no room for a name, which only a person reads
        os.ftruncate(file.fileno(), 0)
        os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return Claim(folder, file, made)


def claim_new(folder: Path) -> Claim:
    """Make and lock a directory that was not there: `folder`, or with the first number behind it that is free.

    Jobs that are started in the same second, as those of an array, so get directories of their own.

    Raises:
        ConfigError: the directory cannot be made.
    """
    for number in itertools.count(1):
        path = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        try:
            made = _make(path.parent)
            path.mkdir()
        except OSError as error:
            if isinstance(error, FileExistsError) and path.parent.is_dir():
                continue
            raise ConfigError(f"{path} cannot be made ({reason_of(error)}): choose another --run-dir") from error
        found = claim(path)
        found.made = [*made, path]
        return found
    raise AssertionError("numbers have no end")


def _make(folder: Path) -> list[Path]:
    """Make a directory and those above it; returns the ones that were not there, outermost first."""
    missing = [path for path in (*reversed(folder.parents), folder) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing
