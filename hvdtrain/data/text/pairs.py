"""Pairs of a text and what it shall become, from files of columns (TSV) and of records (JSON lines, Parquet, Arrow)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from hvdtrain.data.text.compressed import lines_of
from hvdtrain.data.text.corpus import Document
from hvdtrain.data.text.encodings import how_to_convert, text_of
from hvdtrain.data.text.records import kind_of, read_records
from hvdtrain.errors import DataError
from hvdtrain.settings.untrusted import parse_json

Pair = tuple[str, str]
"""A source and its target."""

# Fields by which records are known where no settings name them.
_KNOWN = (
    ("source", "target"),
    ("src", "tgt"),
    ("input", "output"),
    ("prompt", "completion"),
    ("document", "summary"),
    ("article", "highlights"),
    ("text", "summary"),
    ("audio", "text"),
    ("audio", "transcription"),
    ("file", "text"),
    ("path", "sentence"),
    ("audio_filepath", "text"),  # manifests of NeMo
    ("file_name", "transcription"),  # metadata.csv of datasets
    ("file_name", "text"),
)
_MOST_KEPT = 3


@dataclass
class PairReader:
    """Reads pairs, and counts what cannot be used.

    Args:
        source_field: field of a record, or column of a table by its number from 1 or its name in the first line; None:
            known by its usual names, else the first column.
        target_field: likewise; None: by its usual names, else the second column.
        on_error: stop at what cannot be used, or leave it out.
        flags: by which a person names the two fields.
    """

    source_field: str | None
    target_field: str | None
    on_error: Literal["stop", "skip"]
    flags: tuple[str, str] = ("--data.source-field", "--data.target-field")
    num_skipped: int = 0
    skipped: list[str] = field(default_factory=list)
    """The first reasons why something was left out."""

    def read(self, documents: Sequence[Document]) -> Iterator[Pair]:
        """Yield the pairs of all files in their order.

        Raises:
            DataError: a file cannot be read, or a line of it cannot be used; names it.
        """
        for document in documents:
            kind = kind_of(document.path)
            try:
                found = self._table(document) if kind is None else self._records(document, kind)
                for where, pair in found:
                    if isinstance(pair, str):
                        self.pass_over(f"{where} {pair}")
                    else:
                        yield pair
            except (OSError, EOFError) as error:
                raise DataError(f"{document.path} cannot be read: {error}") from error

    def pass_over(self, problem: str) -> None:
        """Count something that cannot be used.

        Raises:
            DataError: it is not to be passed over.
        """
        if self.on_error == "stop":
            raise DataError(f"{problem}: mend it, or leave such lines out with --data.on-error skip")
        self.num_skipped += 1
        if len(self.skipped) < _MOST_KEPT:
            self.skipped.append(problem)

    def _table(self, document: Document) -> Iterator[tuple[str, Pair | str]]:
        """Yield the lines of a table, each with where it stands: a pair, or what is wrong."""
        columns = (self.source_field or "1", self.target_field or "2")
        places = None if any(not name.isdecimal() for name in columns) else tuple(int(name) - 1 for name in columns)
        for number, raw in enumerate(lines_of(document.path), 1):
            where = f"{document.path}, line {number}"
            try:
                line = text_of(raw, "utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"{where} is not UTF-8 text: {how_to_convert(raw)}") from error
            cells = line.split("\t")
            if number == 1 and self.source_field is None is self.target_field and (usual := _usual_columns(cells)):
                places = usual
            elif places is None:
                places = _named_columns(document, cells, columns, self.flags)
            elif line.strip():
                yield where, _pair_of(cells, places)

    def _records(self, document: Document, kind: Any) -> Iterator[tuple[str, Pair | str]]:
        for where, raw in read_records(document.path, kind):
            try:
                record = parse_json(raw) if isinstance(raw, str) else raw
            except ValueError:
                yield where, "is no JSON"
                continue
            yield where, self._pair_in(record)

    def _pair_in(self, record: Any) -> Pair | str:
        """Return the pair of a record, or what is wrong with it."""
        if not isinstance(record, dict):
            return "is no record with fields"
        inner = record.get("translation")
        if isinstance(inner, dict):  # of data sets of translations: a text by language
            record = inner
        names = (self.source_field, self.target_field)
        if None in names:
            names = next((pair for pair in _KNOWN if all(name in record for name in pair)), names)
        shown = ", ".join(map(str, record)) or "none"
        if None in names:
            return f"has the fields {shown}: say which of them it is by {' and '.join(self.flags)}"
        missing = [name for name in names if name not in record]
        if missing:
            return f"has no field '{missing[0]}', but {shown}"
        source, target = (record[name] for name in names)
        if not isinstance(source, str) or not isinstance(target, str):
            return f"has something else than texts in its fields {' and '.join(map(str, names))}"
        return _checked(source, target)


def _named_columns(
    document: Document, cells: list[str], names: Sequence[str], flags: tuple[str, str]
) -> tuple[int, ...]:
    """Return the places of columns that the first line names; numbers are counted from 1.

    Raises:
        DataError: there is no such column.
    """
    titles = [cell.strip() for cell in cells]
    for name in names:
        if not name.isdecimal() and name not in titles:
            raise DataError(
                f"{document.path} has no column '{name}' in its first line, but {', '.join(titles)}: name another by"
                f" {' and '.join(flags)}, or count columns from 1"
            )
    return tuple(int(name) - 1 if name.isdecimal() else titles.index(name) for name in names)


def _usual_columns(cells: list[str]) -> tuple[int, ...]:
    """Return the places of columns that a first line calls by the usual names of fields; none where it does not."""
    titles = [cell.strip().lower() for cell in cells]
    return next((tuple(map(titles.index, pair)) for pair in _KNOWN if all(name in titles for name in pair)), ())


def _pair_of(cells: list[str], places: tuple[int, ...]) -> Pair | str:
    if len(cells) == 1:
        return (
            "has one column: a source and a target are needed, with a tab between them (`paste` makes such lines of two"
            " files)"
        )
    missing = [place for place in places if not 0 <= place < len(cells)]
    if missing:
        return f"has {len(cells)} columns, counted from 1, and none of number {missing[0] + 1}"
    return _checked(cells[places[0]], cells[places[1]])


def _checked(source: str, target: str) -> Pair | str:
    source, target = source.strip(), target.strip()
    if not source or not target:
        return f"has an empty {'target' if source else 'source'}"
    try:
        f"{source}{target}".encode()
    except UnicodeEncodeError:
        return "has half a character (a surrogate of UTF-16 without its other half)"
    return source, target
