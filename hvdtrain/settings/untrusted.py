"""Files that somebody else has written: read without waiting, without end and without leaving their folder."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from hvdtrain.errors import DataError, reason_of

MOST_JSON_BYTES = 64 << 20


def read_bounded(path: Path, most_bytes: int) -> bytes:
    """Return the content of a regular file.

    Raises:
        DataError: it cannot be read, is longer than `most_bytes`, or is a device, a pipe or a directory, which may have
            no end or make the reader wait for ever.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {reason_of(error)}") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"{path} is no regular file")
        if status.st_size > most_bytes:
            raise DataError(f"{path} has {status.st_size:,} bytes; such a file may have {most_bytes:,}")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read(most_bytes)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {reason_of(error)}") from error
    finally:
        os.close(descriptor)


def parse_json(text: str) -> Any:
    """Return what a text of JSON says.

    Raises:
        ValueError: it is none, or is nested so deeply that nobody can mean it.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        DataError: it is not there, or something else.
    """
    try:
        values = parse_json(read_bounded(path, MOST_JSON_BYTES).decode())
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise DataError(f"{path} holds no JSON object")
    return values


def file_in(folder: Path, name: object) -> Path:
    """Return the path of a file that an index names: a plain name of a regular file beside it.

    A link may lead elsewhere: the hub's own cache is made of links.

    Raises:
        DataError: the name has directories in it, or names a device, a pipe or nothing.
    """
    if not isinstance(name, str) or not name or name in (".", "..") or "/" in name or "\0" in name:
        raise DataError(f"an index in {folder} names {str(name)[:100]!r}, which is not a file beside it")
    path = folder / name
    if not path.is_file():
        raise DataError(f"{path} cannot be read: it is not there, or is no regular file")
    return path
