"""Compressed files, read as if they were not: gzip, bzip2, xz and Zstandard."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from hvdtrain.errors import DataError

_BLOCK = 1 << 17


def open_binary(path: Path) -> BinaryIO:
    """Open a file for reading, decompressed where its name says that it is compressed.

    Raises:
        DataError: what decompresses it is not installed.
        OSError: it cannot be read, now or later; EOFError later: it was cut.
    """
    suffix = path.suffix.lower()
    if suffix not in _OPENERS:
        return path.open("rb")
    return cast(BinaryIO, io.BufferedReader(_Checked(_OPENERS[suffix](path)), _BLOCK))


def lines_of(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file, decompressed, without what ends them: a line feed, a carriage return, or both.

    Raises:
        DataError, OSError, EOFError: as `open_binary` does.
    """
    with open_binary(path) as file:
        for raw in file:
            yield from raw.removesuffix(b"\n").removesuffix(b"\r").split(b"\r")


class _Checked(io.RawIOBase):
    """A file whose damage is an OSError or EOFError: each library has errors of its own."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read up to as many bytes as the buffer has; returns how many, 0 at the end."""
        try:
            block = self._file.read(len(buffer))
        except (OSError, EOFError):
            raise
        except Exception as error:
            raise OSError(str(error)) from error
        buffer[: len(block)] = block
        return len(block)

    def close(self) -> None:
        """Close the file below."""
        self._file.close()
        super().close()


class _Zstandard:
    """Reads frame after frame. The library's own file takes one that was cut for one that ends."""

    def __init__(self, path: Path) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise DataError(f"{path} needs zstandard: pip install zstandard") from error
        self._file = path.open("rb")
        self._start = zstandard.ZstdDecompressor().decompressobj
        self._frame: Any = None
        self._rest = b""
        self._ready = b""

    def read(self, size: int) -> bytes:
        """Return up to so many bytes, none at the end."""
        while not self._ready:
            raw = self._rest or self._file.read(_BLOCK)
            self._rest = b""
            if not raw:
                if self._frame is not None:
                    raise EOFError("the file ends within a frame: it was cut")
                return b""
            if self._frame is None:
                self._frame = self._start()
            self._ready = self._frame.decompress(raw)
            if self._frame.eof:
                self._rest, self._frame = self._frame.unused_data, None
        block, self._ready = self._ready[:size], self._ready[size:]
        return block

    def close(self) -> None:
        """Close the file."""
        self._file.close()


_OPENERS: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _Zstandard}
SUFFIXES = tuple(_OPENERS)
