"""Files as they are found: patterns, links, names and what is none of text. One sentence says what was wrong."""

import bz2
import gzip
import os
import zipfile

import numpy as np
import pytest

from hvdtrain.data.config import CorpusConfig
from hvdtrain.data.matching import matching
from hvdtrain.data.text.corpus import NotTextError, find_documents
from hvdtrain.data.text.pairs import PairReader
from hvdtrain.data.text.sources import find_sources
from hvdtrain.data.text.splits import find_splits
from hvdtrain.errors import DataError

TEXT = "".join(f"line {i} of a text\n" for i in range(200))


@pytest.fixture
def corpus(tmp_path):
    for name in ("a.txt", "b/c.txt", "b/d/e.txt", "b/d/f.md", ".hidden/g.txt", "b/.h.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(TEXT)
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("**/*.txt", {"a.txt", "b/c.txt", "b/d/e.txt"}),
        ("**", {"a.txt", "b", "b/c.txt", "b/d", "b/d/e.txt", "b/d/f.md"}),
        ("b/**/d/*", {"b/d/e.txt", "b/d/f.md"}),
        ("**/d/**/*.md", {"b/d/f.md"}),
        ("**/.h*", {".hidden", "b/.h.txt"}),
        ("*.txt", {"a.txt"}),
        ("nothing/**/*.txt", set()),
    ],
)
def test_a_pattern_matches_what_glob_does(corpus, monkeypatch, pattern, names):
    assert {str(path.relative_to(corpus)) for path in matching(corpus / pattern)} == names
    monkeypatch.chdir(corpus)
    assert {str(path) for path in matching(pattern)} == names


def test_a_pattern_comes_to_an_end_where_links_lead_in_circles(corpus):
    for name, to in (("b/up", ".."), ("b/here", "."), ("b/d/top", "../..")):
        (corpus / name).symlink_to(to)
    assert {path.name for path in matching(corpus / "**" / "*.txt")} == {"a.txt", "c.txt", "e.txt"}
    assert find_documents(f"{corpus}/**/*.txt")


def test_a_link_to_itself_is_named_as_one(corpus):
    (corpus / "b" / "x.txt").symlink_to("x.txt")
    with pytest.raises(DataError, match=r"b/x\.txt is a link to what is not there"):
        find_documents(str(corpus))


def test_a_pipe_among_texts_is_refused(corpus):
    """Left out in silence it would be data that is missing; read it would be waited for."""
    os.mkfifo(corpus / "b" / "pipe.txt")
    with pytest.raises(DataError, match=r"b/pipe\.txt is no regular file"):
        find_documents(str(corpus))


@pytest.mark.parametrize("pattern", ["", "*.txt"])
def test_a_name_that_is_no_text_is_one_sentence(tmp_path, pattern):
    (tmp_path / "a.txt").write_text(TEXT)
    with open(os.fsencode(tmp_path) + b"/\xff.txt", "w") as file:  # noqa: PTH123  Path takes no bytes
        file.write(TEXT)
    with pytest.raises(DataError, match=r"udcff\.txt' is not UTF-8: rename it"):
        find_documents(str(tmp_path / pattern))


@pytest.mark.parametrize(("encoding", "order"), [("utf-16-le", "le"), ("utf-16-be", "be")])
def test_utf_16_of_plain_letters_is_no_utf_8(tmp_path, encoding, order):
    """Each of its bytes is one of UTF-8, every second one a zero: it was trained on as it was."""
    (tmp_path / "a.txt").write_bytes(TEXT.encode(encoding))
    (document,) = find_documents(str(tmp_path / "a.txt"))
    with pytest.raises(NotTextError, match=f"convert it, as with iconv -f utf-16{order} -t utf-8"):
        list(document.pieces())
    assert document.digest() is None
    (tmp_path / "a.tsv").write_bytes("a\tb\n".encode(encoding))
    with pytest.raises(DataError, match=f"line 1 is not UTF-8 text: .*utf-16{order}"):
        list(PairReader(None, None, "stop").read(find_documents(str(tmp_path / "a.tsv"))))


def test_a_few_zeros_are_text(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT.replace("line", "li\0ne"))
    (document,) = find_documents(str(tmp_path / "a.txt"))
    assert "".join(document.pieces()).count("\0") == 200


def split(tmp_path, path, val_path=None):
    said = []
    config = CorpusConfig(
        path=str(tmp_path / path),
        val_path=val_path and str(tmp_path / val_path),
        cache_dir=str(tmp_path / "cache"),
        val_fraction=0.34,
    )
    for find in (find_splits, find_sources):
        find(config, said.append)
    assert said[::2] == said[1::2]  # by either way
    return said[::2]


def test_held_out_texts_that_are_trained_on_are_told(tmp_path):
    (tmp_path / "all").mkdir()
    (tmp_path / "other").mkdir()
    for i in range(9):
        (tmp_path / "all" / f"{i}.txt").write_text(TEXT + str(i))
        (tmp_path / "other" / f"{i}.txt").write_text(TEXT + f"{i}0")
    assert split(tmp_path, "all") == split(tmp_path, "all", "other") == []
    (line,) = split(tmp_path, "all", "all/3.txt")
    assert line.startswith(f"1 of 1 held-out file is trained on, too: {tmp_path}/all/3.txt; ")
    (tmp_path / "other" / "1.txt").write_text(TEXT + "8")
    (line,) = split(tmp_path, "all", "other")
    assert line.startswith(f"1 of 9 held-out files is trained on, too: {tmp_path}/other/1.txt; ")
    for i in range(9):
        (tmp_path / "all" / f"{i}.txt").write_text(TEXT)
    (line,) = split(tmp_path, "all")
    assert "held-out files are trained on, too: " in line


def test_a_directory_of_tokens_says_how_they_are_named(tmp_path):
    for name in ("train.bin", "val.bin"):
        np.arange(50_000, dtype=np.uint16).tofile(tmp_path / name)
    advice = rf"--data.path {tmp_path}/train\.bin --data.val-path {tmp_path}/val\.bin"
    with pytest.raises(DataError, match=advice):
        find_splits(CorpusConfig(path=str(tmp_path), cache_dir=str(tmp_path / "cache")), print)


def packed(folder, kind):
    path = folder / "a.txt"
    if kind == "zip archive":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("inside.txt", TEXT)
    else:
        path.write_bytes({"gzip": gzip, "bzip2": bz2}[kind].compress(TEXT.encode()))
    return path


@pytest.mark.parametrize("kind", ["gzip", "bzip2", "zip archive"])
def test_what_is_compressed_is_called_that(tmp_path, kind):
    (document,) = find_documents(str(packed(tmp_path, kind)))
    with pytest.raises(NotTextError, match=rf"it is .*{kind}"):
        list(document.pieces())
