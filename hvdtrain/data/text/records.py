"""Files of records: JSON lines, JSON arrays, CSV, Parquet and Arrow; JSON and CSV also compressed."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from hvdtrain.data.text.compressed import SUFFIXES, lines_of, open_binary
from hvdtrain.data.text.csv_records import csv_records
from hvdtrain.data.text.encodings import how_to_convert, text_of
from hvdtrain.errors import DataError
from hvdtrain.settings.untrusted import parse_json

Kind = Literal["lines", "array", "csv", "parquet", "arrow"]
"""Of a file of records; array: values of JSON one after the other, over any number of lines, and arrays of records."""

_KINDS: dict[str, Kind] = {
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".json": "array",
    ".csv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
_HEAD_BYTES = 1 << 20
_BEGINS_AS_OBJECT = re.compile(r'\{\s*"(?:[^"\\]|\\.)*"\s*:')
_WHITESPACE = re.compile(r"[\s\ufeff]*")


def is_turn(value: Any) -> bool:
    """Return whether this is part of a conversation: a message with a role, or a turn that is from somebody."""
    return isinstance(value, dict) and ("role" in value or "from" in value)


def holds_records(path: Path) -> bool:
    """Return whether a file's name says that it holds nothing but records; a .json or .csv is a text to some."""
    return _named(path) in ("lines", "parquet", "arrow")


def _named(path: Path) -> Kind | None:
    """Return the kind of records that a file's name says, compressed or not."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] and suffixes[-1] in SUFFIXES:
        suffixes.pop()
    return _KINDS.get(suffixes[-1]) if suffixes else None


def kind_of(path: Path) -> Kind | None:
    """Return what kind of records a file holds, by its name and by how it begins; None for a text.

    A file that begins as JSON does is none of text, whatever it is called.
    """
    named = _named(path)
    if named in ("parquet", "arrow", "csv"):
        return named
    try:
        with open_binary(path) as file:
            raw = file.read(_HEAD_BYTES)
        head = codecs.getincrementaldecoder("utf-8-sig")().decode(raw).lstrip()
    except (OSError, UnicodeDecodeError, DataError, EOFError):
        return named
    return _kind_by_head(head, len(raw) < _HEAD_BYTES, named) or named


def _kind_by_head(head: str, is_whole: bool, named: Kind | None) -> Kind | None:
    """Return what kind of records begin like this; None where that does not say.

    Args:
        head: the beginning of a file.
        is_whole: it is all of it.
        named: the kind by the name of the file.
    """
    line, _, rest = (part.strip() for part in re.sub(r"\r\n?", "\n", head).partition("\n"))
    if line[:1] not in ("{", "["):
        return None
    try:
        value = parse_json(line)
    except ValueError:
        if named is None and not _BEGINS_AS_OBJECT.match(head.removeprefix("[").lstrip()):
            return None
        # Records over several lines break off where more must follow; a line of JSON that is broken is told later.
        goes_on = line.endswith(("{", "[", ",")) or (line[0] == "[" and not is_whole and not rest)
        return "array" if goes_on or named is None else None
    is_last = is_whole and not rest
    if isinstance(value, dict):
        return "array" if is_last and named != "lines" else "lines"
    if is_turn(value[0] if value else None):
        return "array" if is_last and named != "lines" else "lines"
    return "array" if named or (value and isinstance(value[0], dict)) else None


def read_records(path: Path, kind: Kind) -> Iterator[tuple[str, Any]]:
    """Yield the records of a file, each with where it stands; lines of JSON as text that is not parsed yet.

    Raises:
        DataError: the file cannot be read; names it.
    """
    try:
        if kind == "lines":
            yield from _lines(path)
        elif kind == "array":
            yield from _values(path)
        elif kind == "csv":
            yield from csv_records(path)
        else:
            yield from _rows(path, kind)
    except (OSError, EOFError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    for number, part in enumerate(lines_of(path), 1):  # no JSON holds a carriage return
        try:
            line = text_of(part).strip().strip("\ufeff")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}, line {number} is not UTF-8 text: {how_to_convert(part)}") from error
        if line:
            yield f"{path}, line {number}", line


def _values(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the records of a file that holds values of JSON, whole in memory."""
    with open_binary(path) as file:
        raw = file.read()
    try:
        text = text_of(raw, "utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {how_to_convert(raw)}") from error
    number = 0
    for value in _parsed(path, text):
        for record in _records_in(path, value):
            number += 1
            # A text of JSON is a line that is not parsed yet.
            yield f"{path}, record {number}", json.dumps(record) if isinstance(record, str) else record


def _parsed(path: Path, text: str) -> Iterator[Any]:
    decoder, at = json.JSONDecoder(), 0
    while True:
        found = _WHITESPACE.match(text, at)
        at = found.end() if found else at
        if at == len(text):
            return
        try:
            value, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {error.lineno}: not JSON ({error})") from error
        except RecursionError as error:
            raise DataError(f"{path} is not JSON (it is nested too deeply)") from error
        except ValueError as error:
            raise DataError(f"{path} is not JSON ({error})") from error
        yield value


def _records_in(path: Path, value: Any) -> list[Any]:
    """Return the records of a value of JSON: itself, those of an array, or those of the one array that it holds."""
    if isinstance(value, list):
        return [value] if value and is_turn(value[0]) else value
    if isinstance(value, dict):
        arrays = [name for name, item in value.items() if _is_array_of_records(item)]
        if len(arrays) > 1:
            raise DataError(
                f"{path} holds an object with several arrays of records ({', '.join(arrays)}): give each a file of its"
                " own, and name the one for training and, with --data.val-path, the held-out one"
            )
        if arrays:
            return list(value[arrays[0]])
    return [value]


def _is_array_of_records(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and not is_turn(value[0])


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
