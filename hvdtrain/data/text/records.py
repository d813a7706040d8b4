"""Files of records: JSON lines, JSON arrays, Parquet and Arrow; JSON also compressed by gzip or Zstandard."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TextIO

from hvdtrain.errors import DataError

Kind = Literal["lines", "array", "parquet", "arrow"]

_KINDS: dict[str, Kind] = {
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".json": "array",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
_COMPRESSED = (".gz", ".zst")
_HEAD_CHARACTERS = 1 << 20


def kind_of(path: Path) -> Kind | None:
    """Return what kind of records a file holds, by its name, or by how it begins; None for a text.

    A file that begins as JSON does is none of text, whatever it is called.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    kind = _KINDS.get(suffixes[-1]) if suffixes else None
    if kind is None or kind == "array":
        found = _kind_by_content(path)
        return found or kind
    return kind


def _kind_by_content(path: Path) -> Kind | None:
    try:
        with _open(path) as file:
            head = file.read(_HEAD_CHARACTERS).lstrip()
    except (OSError, UnicodeDecodeError, DataError, EOFError):
        return None
    if head.startswith("{"):
        with contextlib.suppress(ValueError):
            return "lines" if isinstance(json.loads(head.partition("\n")[0]), dict) else None
    inside = head[1:].lstrip()
    return "array" if head.startswith("[") and inside.startswith('{"') else None


def read_records(path: Path, kind: Kind) -> Iterator[tuple[str, Any]]:
    """Yield the records of a file, each with where it stands; lines of JSON as text that is not parsed yet.

    Raises:
        DataError: the file cannot be read; names it.
    """
    try:
        if kind == "lines":
            yield from _lines(path)
        elif kind == "array":
            yield from _array(path)
        else:
            yield from _rows(path, kind)
    except (OSError, EOFError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: convert it, as with iconv -f latin1 -t utf-8") from error


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path}, line {number}", line.strip()


def _array(path: Path) -> Iterator[tuple[str, Any]]:
    with _open(path) as file:
        text = file.read()
    try:
        values = json.loads(text)
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error})") from error
    for number, value in enumerate(values if isinstance(values, list) else [values], 1):
        yield f"{path}, record {number}", value


def _rows(path: Path, kind: Kind) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{path} needs pyarrow: pip install pyarrow") from error
    number = 0
    try:
        if kind == "parquet":
            batches = pyarrow.parquet.ParquetFile(path).iter_batches()
        else:
            batches = _arrow_batches(pyarrow, path)
        for batch in batches:
            for value in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", value
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _arrow_batches(pyarrow: Any, path: Path) -> Iterator[Any]:
    """Yield the batches of a stream, as `save_to_disk` of datasets writes, or of an Arrow file."""
    with pyarrow.memory_map(str(path)) as source:
        try:
            yield from pyarrow.ipc.open_stream(source)
            return
        except pyarrow.ArrowInvalid:
            source.seek(0)
        file = pyarrow.ipc.open_file(source)
        for i in range(file.num_record_batches):
            yield file.get_batch(i)


def _open(path: Path) -> TextIO:
    """Open a file as UTF-8, with or without a byte order mark, compressed or not."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return io.TextIOWrapper(gzip.open(path), encoding="utf-8-sig")
    if suffix == ".zst":
        try:
            import zstandard
        except ImportError as error:
            raise DataError(f"{path} needs zstandard: pip install zstandard") from error
        return io.TextIOWrapper(zstandard.open(path, "rb"), encoding="utf-8-sig")
    return path.open(encoding="utf-8-sig")
