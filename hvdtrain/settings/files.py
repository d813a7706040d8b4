"""Files and folders that appear whole or not at all, and one process of a host at a time."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on the file `path`; it is released when the process ends, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to write files to; afterwards it is flushed to disk and gets its name, or is removed."""
    temporary = folder.with_name(f"{folder.name}.writing-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for path in temporary.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextlib.contextmanager
def replaced_whole(path: Path) -> Iterator[Path]:
    """Yield the path of a file to write; afterwards it is flushed to disk and takes the place of `path`.

    What was there before stays until then, and where the writing fails.
    """
    temporary = path.with_name(f".{path.name}.writing-{os.getpid()}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def telling_why(path: Path) -> Iterator[None]:
    """Raise the system's reason where torch, which writes `path` within, tells of a full disk as "unexpected pos".

    Some more is written behind what torch has left: that fails for the same reason, and says it.
    """
    try:
        yield
    except RuntimeError as error:
        if not path.is_file():
            raise
        try:
            with path.open("ab", buffering=0) as file:
                for _ in range(2):  # the first may be written in part
                    file.write(bytes(1 << 20))
        except OSError as reason:
            raise reason from error
        raise


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file of any size, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def flushed_sha256(path: Path) -> str:
    """Flush a file that was just written to disk, and return its SHA-256."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return sha256_of(path)


def write_flushed(path: Path, text: str) -> None:
    """Write a file and flush it to disk."""
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def flush_folder(path: Path) -> None:
    """Make renames in a folder durable; some file systems refuse, which is no error."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)
