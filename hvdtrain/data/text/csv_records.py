"""Tables of comma-separated values, as spreadsheets and pandas write them: a record a row, named by the first line."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterator
from pathlib import Path

from hvdtrain.data.text.compressed import open_binary
from hvdtrain.data.text.encodings import how_to_convert
from hvdtrain.errors import DataError, counted

_DELIMITERS = ",;\t"
_LONGEST_CELL = 2**31 - 1


def csv_records(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the rows of a table, each with where it ends; what separates its cells is seen in the first line.

    Raises:
        DataError: it is no table of UTF-8, or a row has another number of cells than the first line has names.
        OSError, EOFError: it cannot be read.
    """
    csv.field_size_limit(_LONGEST_CELL)  # Python's own limit is less than a long text
    with open_binary(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        try:
            first = text.readline()
            if "\0" in first:
                raise DataError(f"{path} is not UTF-8 text: {how_to_convert(first.encode())}")
            delimiter = max(_DELIMITERS, key=first.count)
            yield from _rows(path, csv.reader(itertools.chain([first], text), delimiter=delimiter, strict=True))
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8 text: {how_to_convert(error.object)}") from error


def _rows(path: Path, reader: Iterator[list[str]]) -> Iterator[tuple[str, dict[str, str]]]:
    names: list[str] | None = None
    try:
        for cells in reader:
            place = f"{path}, line {reader.line_num}"  # type: ignore[attr-defined]
            if not cells:
                continue
            if names is None:
                names = _names(place, cells)
            elif len(cells) != len(names):
                raise DataError(
                    f"{place} has {counted(len(cells), 'cell')}, and the first line names"
                    f" {counted(len(names), 'column')}: what holds commas or line breaks stands in quotation marks"
                )
            else:
                yield place, dict(zip(names, cells, strict=True))
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not CSV ({error})") from error  # type: ignore[attr-defined]


def _names(place: str, cells: list[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{place} names two columns {twice!r}: the first line of a .csv file names its columns")
    return names
