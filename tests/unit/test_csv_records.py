"""Tables of comma-separated values: what spreadsheets and pandas write is read, what is damaged is one sentence."""

import csv
import gzip

import pytest

from hvdtrain.data.text.corpus import find_documents
from hvdtrain.data.text.pairs import PairReader
from hvdtrain.data.text.records import holds_records, kind_of, read_records
from hvdtrain.errors import DataError

ROWS = [
    {"text": "plain", "label": "1"},
    {"text": 'commas, "quotes"; and\nlines\r\nin a cell', "label": ""},
    {"text": "ü" * 200_000, "label": "2"},  # longer than Python's own limit
]


def write(path, delimiter=",", begin="", encoding="utf-8", newline="\r\n"):
    with path.open("w", encoding=encoding, newline="") as file:
        file.write(begin)
        writer = csv.DictWriter(file, ["text", "label"], delimiter=delimiter, lineterminator=newline)
        writer.writeheader()
        writer.writerows(ROWS)
    return path


def read(path):
    return [value for _, value in read_records(path, kind_of(path))]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("begin", ["", "\ufeff"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_rows_are_records_by_the_names_of_the_first_line(tmp_path, delimiter, begin, newline):
    path = write(tmp_path / "a.csv", delimiter, begin, newline=newline)
    assert kind_of(path) == "csv"
    assert not holds_records(path)  # to `lm` it is a text
    assert read(path) == ROWS
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert read(tmp_path / "a.csv.gz") == ROWS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"text,label\na,b\nc,d,e\n", r"a\.csv, line 3 has 3 cells, and the first line names 2 columns: .*quotation"),
        (b"text,label\na,b\nc\n", r"line 3 has 1 cell, and"),
        (b"text,text\na,b\n", r"line 1 names two columns 'text'"),
        (b'text,label\n"a"b,c\n', r"line 2: not CSV"),
        (b'text,label\n"a,c\n', r"not CSV"),
        ("text,label\nä,b\n".encode("latin-1"), r"a\.csv is not UTF-8 text: .*latin1"),
        ("text,label\nä,b\n".encode("utf-16"), r"is not UTF-8 text: .*utf-16 "),
        ("text,label\na,b\n".encode("utf-16-le"), r"is not UTF-8 text: .*utf-16le"),
    ],
)
def test_what_is_damaged_is_one_sentence(tmp_path, content, message):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path / "a.csv")
    assert "\n" not in str(caught.value)


def test_an_empty_table_has_no_rows(tmp_path):
    for content in ("", "text,label\n", "\n\n"):
        (tmp_path / "a.csv").write_text(content)
        assert read(tmp_path / "a.csv") == []


@pytest.mark.parametrize(
    ("names", "fields"),
    [
        ("source,target", (None, None)),
        ("file_name,transcription", (None, None)),  # as `datasets` has clips
        ("de,en", ("de", "en")),
    ],
)
def test_pairs_of_a_table(tmp_path, names, fields):
    (tmp_path / "a.csv").write_text(f'{names}\n"one, two",eins\nthree,\n')
    reader = PairReader(*fields, "skip")
    assert list(reader.read(find_documents(str(tmp_path / "a.csv")))) == [("one, two", "eins")]
    assert reader.skipped[0].endswith("a.csv, line 3 has an empty target")
