"""Files and folders that appear whole or not at all, and one process of a host at a time."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
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
        _flush(temporary)
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
        _flush(temporary)
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def replaced_files(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to write to; afterwards each file in it takes the place of its namesake in `folder`.

    What was there before stays until then, and where the writing fails; so do files of other names.

    Raises:
        OSError: also where a library in Rust, as tokenizers, tells of it by an exception of its own.
    """
    temporary = folder.with_name(f".{folder.name}.writing-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        try:
            yield temporary
        except Exception as error:
            found = re.search(r"\(os error (\d+)\)", str(error))
            if found is None or isinstance(error, OSError):
                raise
            raise OSError(int(found[1]), os.strerror(int(found[1]))) from error
        folder.mkdir(exist_ok=True)
        for path in sorted(temporary.iterdir()):
            _flush(path)
            if path.is_dir():
                shutil.rmtree(folder / path.name, ignore_errors=True)
            path.replace(folder / path.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_half_written(folder: Path) -> None:
    """Remove what processes that were killed have left of files that were to be replaced; this one's stay."""
    for path in folder.glob(".*.writing-*"):
        if not path.name.endswith(f".writing-{os.getpid()}"):
            with contextlib.suppress(OSError):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _flush(path: Path) -> None:
    """Flush a file, or the files of a folder, to disk."""
    for item in path.rglob("*") if path.is_dir() else (path,):
        if item.is_file():
            with item.open("rb") as file:
                os.fsync(file.fileno())


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
