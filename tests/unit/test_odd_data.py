"""Files, folders and lines as people bring them: each works, or is one sentence that names the file and the line."""

import bz2
import gzip
import json
import lzma
import os

import pytest
from hugging import import_transformers
from templates import make_chat_tokenizer

from hvdtrain.data.config import CorpusConfig
from hvdtrain.data.text.documents import DocumentReader
from hvdtrain.data.text.named_splits import split_of
from hvdtrain.data.text.sources import find_sources
from hvdtrain.errors import DataError

import_transformers()
pytestmark = pytest.mark.filterwarnings("default")  # transformers' own are none of ours
ASKED, ANSWER = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}
TALK = {"messages": [ASKED, ANSWER]}
GOOD = [json.dumps({"text": f"text {i}"}) for i in range(9)]
LINES = "".join(f"{line}\n" for line in GOOD)
PRETTY = "\n".join(json.dumps(json.loads(line), indent=1) for line in GOOD)


@pytest.fixture(scope="module")
def tokenizer():
    return make_chat_tokenizer("bytes", "chatml")


@pytest.fixture
def read(tmp_path, tokenizer):
    """Write files and read them; returns the number of records of each format by split, and what was said."""

    def read(files, path="data", **settings):
        for name, content in files.items():
            place = tmp_path / "data" / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content if isinstance(content, bytes) else content.encode())
        said = []
        config = CorpusConfig(
            path=str(tmp_path / path), cache_dir=str(tmp_path / "cache"), val_fraction=0.2, **settings
        )
        counts = {}
        for name, part in find_sources(config, said.append).items():
            reader = DocumentReader(tokenizer, "text", "stop")
            list(reader.read(part))
            counts[name] = dict(reader.formats)
        return counts, said

    return read


def in_all(counts):
    """Return how many records there are of each format."""
    return {name: sum(part.get(name, 0) for part in counts.values()) for part in counts.values() for name in part}


TEXTS = {"text": 9}
WORKS = {
    "several formats": (
        {"a.jsonl": LINES, "b.txt": "hello world", "c.json": json.dumps([TALK] * 2), "d.jsonl": ""},
        {"text": 9, "messages": 2, "text files": 1},
    ),
    "CRLF": ({"a.jsonl": LINES.replace("\n", "\r\n")}, TEXTS),
    "CR": ({"a.jsonl": LINES.replace("\n", "\r")}, TEXTS),
    "byte order mark": ({"a.jsonl": "\ufeff" + LINES}, TEXTS),
    "files with marks, put together": ({"a.jsonl": "".join(f"\ufeff{line}\n" for line in GOOD)}, TEXTS),
    "other line separators in a text": (
        {"a.jsonl": "".join(json.dumps({"text": f"a\u2028b\x85{i}"}, ensure_ascii=False) + "\n" for i in range(9))},
        TEXTS,
    ),
    "a huge line": ({"a.json": json.dumps({"other": "x " * 600_000, "text": "x"}) + "\n" + LINES}, {"text": 10}),
    "over several lines": ({"a.json": PRETTY}, TEXTS),
    "over several lines, by another name": ({"a.jsonl": PRETTY, "b.txt": PRETTY}, {"text": 18}),
    "an array in a .jsonl": ({"a.jsonl": f"[{','.join(GOOD)}]"}, TEXTS),
    "an array over several lines in a .jsonl": ({"a.jsonl": "[\n" + ",\n".join(GOOD) + "\n]"}, TEXTS),
    "an array within an object": ({"a.json": f'{{"version": "1", "data": [{",".join(GOOD)}]}}'}, TEXTS),
    "a list of messages a line": ({"a.jsonl": f"{json.dumps([ASKED, ANSWER])}\n" * 9}, {"messages": 9}),
    "lists of messages": ({"a.json": json.dumps([[ASKED, ANSWER]] * 9)}, {"messages": 9}),
    "conversations by another name": (
        {"a.jsonl": f"{json.dumps({'id': 1, 'dialog': [ASKED, ANSWER]})}\n" * 9},
        {"conversations in dialog": 9},
    ),
    "turns in messages": (
        {"a.jsonl": json.dumps({"messages": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]}) + "\n"},
        {"messages": 1},
    ),
    "fields that are null": ({"a.jsonl": LINES + '{"messages": null, "text": "x"}\n'}, {"text": 10}),
    "gzip in two parts": ({"a.jsonl.gz": gzip.compress(LINES.encode()) * 2}, {"text": 18}),
    "bzip2": ({"a.jsonl.bz2": bz2.compress(LINES.encode())}, TEXTS),
    "xz": ({"a.json.xz": lzma.compress(PRETTY.encode())}, TEXTS),
    "a directory by a file's name": ({"x.jsonl/a.jsonl": LINES}, TEXTS),
    "hidden files": ({"a.jsonl": LINES, ".b.jsonl": "{", ".git/c.jsonl": "{"}, TEXTS),
}


@pytest.mark.parametrize("case", WORKS)
def test_what_works(read, case):
    files, expected = WORKS[case]
    assert in_all(read(files)[0]) == expected


@pytest.mark.parametrize("role", ["human", "User", "USER"])
@pytest.mark.parametrize("other", ["model", "gpt", "bot", "Assistant"])
def test_roles_by_other_names(read, tokenizer, role, other):
    talk = {"messages": [{"role": role, "content": "hello"}, {"role": other, "content": "world"}]}
    assert in_all(read({"a.jsonl": f"{json.dumps(talk)}\n"})[0]) == {"messages": 1}
    (document,) = DocumentReader(tokenizer, "text", "stop").passages_of(talk)
    assert document.text == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nworld<|im_end|>\n"


def message(value):
    return LINES + json.dumps({"messages": [ASKED, value]}) + "\n"


SAID = {
    "nothing": ({"a.jsonl": "", "b.jsonl": ""}, r"data holds no UTF-8 text and no records"),
    "UTF-16 lines": ({"a.jsonl": LINES.encode("utf-16")}, r"a\.jsonl, line 1 is not UTF-8 .* iconv -f utf-16"),
    "a UTF-16 text": ({"a.txt": "hello".encode("utf-16")}, r"a\.txt is not UTF-8 text .*iconv -f utf-16"),
    "a picture": ({"a.txt": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"}, r"a\.txt is not UTF-8 text .*: it is no text at all"),
    "Latin-1": ({"a.jsonl": LINES.encode() + '"é"'.encode("latin1")}, r"a\.jsonl, line 10 is not UTF-8 .*latin1"),
    "nested too deeply": ({"a.jsonl": LINES + "[" * 100_000}, r"a\.jsonl, line 10: not JSON \(it is nested too"),
    "nested too deeply, all": ({"a.json": '{"a":' * 100_000}, r"a\.json is not JSON \(it is nested too deeply\)"),
    "cut by a line": ({"a.json": "[\n" + GOOD[0] + ",\n" + GOOD[1][:9]}, r"a\.json, line 3: not JSON"),
    "a comma too many": ({"a.jsonl": ",\n".join(GOOD)}, r"a\.jsonl, line 1: not JSON"),
    "Python instead of JSON": ({"a.jsonl": "{'text': 'x'}\n"}, r"a\.jsonl, line 1: not JSON"),
    "a page of HTML": ({"a.jsonl": "<!DOCTYPE html>"}, r"a\.jsonl, line 1: not JSON"),
    "several splits in one": (
        {"a.json": json.dumps({"train": [TALK], "test": [TALK]})},
        r"a\.json holds an object with several arrays of records \(train, test\): give each a file",
    ),
    "columns": ({"a.json": '{"text": ["a", "b"]}'}, r"a\.json, record 1: 'text' is a list, not a text"),
    "texts": ({"a.json": '["a", "b"]'}, r"a\.json, record \d: a record is an object with fields, not a text"),
    "a number": ({"a.jsonl": LINES + '{"text": NaN}'}, r"line 10: 'text' is a number, not a text"),
    "no list": ({"a.jsonl": LINES + '{"messages": "x"}'}, r"line 10: 'messages' is a text, not a list of messages"),
    "an image": ({"a.jsonl": message({**ANSWER, "content": [{"type": "image"}]})}, r"line 10: .* of type image\)"),
    "lists of lists": ({"a.jsonl": message({**ANSWER, "content": [["x"]]})}, r"line 10: .* neither a text nor a list"),
    "no content": ({"a.jsonl": message({**ANSWER, "content": None})}, r"line 10: a message needs a 'role'"),
    "calls that are none": ({"a.jsonl": message({**ANSWER, "tool_calls": 5})}, r"line 10: 'tool_calls' of a message"),
    "one call": ({"a.jsonl": message({**ANSWER, "tool_calls": {"x": 1}})}, r"line 10: 'tool_calls' of a message"),
    "a weight in words": ({"a.jsonl": message({**ANSWER, "weight": "0"})}, r"line 10: 'weight' of a message is '0'"),
    "half a weight": ({"a.jsonl": message({**ANSWER, "weight": 0.5})}, r"line 10: 'weight' of a message is 0.5"),
    "variables": (
        {"a.jsonl": json.dumps({**TALK, "chat_template_kwargs": [1]})},
        r"line 1: .* is a list, not an object",
    ),
    "no variable": (
        {"a.jsonl": json.dumps({**TALK, "chat_template_kwargs": {"chat_template": "x"}})},
        r"line 1: 'chat_template_kwargs' sets chat_template, which is no variable",
    ),
    "cut gzip": ({"a.jsonl.gz": gzip.compress(os.urandom(9999).hex().encode())[:-99]}, r"a\.jsonl\.gz cannot be read"),
    "no gzip": ({"a.jsonl.gz": LINES}, r"a\.jsonl\.gz cannot be read: Not a gzipped file"),
    "damaged xz": ({"a.jsonl.xz": lzma.compress(LINES.encode())[:-30] + b"x" * 30}, r"a\.jsonl\.xz cannot be read"),
    "a compressed text": ({"a.txt.gz": gzip.compress(b"hello")}, r"a\.txt\.gz is compressed and holds no records"),
    "no parquet": ({"a.zip": b"PK\x03\x04\xff\xfe"}, r"a\.zip is not UTF-8 text"),
}


@pytest.mark.parametrize("case", SAID)
def test_what_is_said(read, case):
    files, expected = SAID[case]
    with pytest.raises(DataError, match=expected):
        read(files)


def test_links(read, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "folder").mkdir(parents=True)
    (elsewhere / "a.jsonl").write_text(LINES)
    (elsewhere / "folder" / "b.jsonl").write_text(LINES)
    (elsewhere / "folder" / "up").symlink_to(elsewhere)  # a circle
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.jsonl").symlink_to(elsewhere / "a.jsonl")
    (data / "folder").symlink_to(elsewhere / "folder")
    (data / "nothing.jsonl").symlink_to(elsewhere / "nothing")
    os.mkfifo(data / "pipe.jsonl")
    with pytest.raises(DataError, match=r"nothing\.jsonl is a link to what is not there"):
        read({})
    (data / "nothing.jsonl").unlink()
    with pytest.raises(DataError, match=r"pipe\.jsonl is no regular file"):
        read({})
    (data / "pipe.jsonl").unlink()
    counts, _ = read({})
    assert in_all(counts) == {"text": 27}  # the circle's first turn shows a.jsonl once more


def test_splits_that_a_folder_names(read, tmp_path):
    counts, said = read({"train-00000-of-00002.jsonl": LINES, "train-00001-of-00002.jsonl": LINES, "test.jsonl": LINES})
    assert counts == {"train": {"text": 18}, "val": {"text": 9}}
    assert said == ["held out is the test split that the folder names (1 file)"]
    counts, said = read({"validation.jsonl": GOOD[0], "more.jsonl": LINES})
    assert counts == {"train": {"text": 27}, "val": {"text": 1}}
    assert "left out is its test split (1 file)" in said[0]
    counts, said = read({}, val_path=str(tmp_path / "data" / "validation.jsonl"))
    assert counts == {"train": {"text": 27}, "val": {"text": 1}}
    assert said == ["left out are 2 files, whose names say that they are for validation or tests"]


def test_a_folder_of_one_split_is_held_out_of_by_hash(read):
    counts, said = read({"data/train.jsonl": LINES, "data/more.jsonl": LINES})
    assert counts["train"]["text"] > counts["val"]["text"] > 0
    assert not said


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train/data-00000-of-00001.arrow", "train"),
        ("default/validation/0000.parquet", "validation"),
        ("data/test-00000-of-00001.parquet", "test"),
        ("my_dev.jsonl.gz", "validation"),
        ("Training.json", "train"),
        ("contest.jsonl", None),
        ("retrain/a.jsonl", None),
        ("testing_the_waters/a.jsonl", None),
    ],
)
def test_names_of_splits(name, split):
    assert split_of(name) == split


def save_to_disk(folder, records, shards=1):
    """Write a data set as `save_to_disk` of datasets does."""
    pyarrow = pytest.importorskip("pyarrow")
    folder.mkdir(parents=True)
    files = [f"data-{i:05}-of-{shards:05}.arrow" for i in range(shards)]
    for i, name in enumerate(files):
        table = pyarrow.Table.from_pylist(records[i::shards])
        with pyarrow.OSFile(str(folder / name), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
    state = {"_data_files": [{"filename": name} for name in files], "_fingerprint": "0", "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")


def test_a_saved_data_set(read, tmp_path):
    records = [json.loads(line) for line in GOOD]
    save_to_disk(tmp_path / "data", records, shards=2)
    save_to_disk(tmp_path / "cached", records)
    (tmp_path / "cached" / "data-00000-of-00001.arrow").rename(tmp_path / "data" / "cache-0123.arrow")
    assert in_all(read({})[0]) == TEXTS  # without what `map` has kept beside it
    (tmp_path / "data" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(DataError, match=r"data-00001-of-00002\.arrow is not there, which .*state\.json names"):
        read({})


def test_a_saved_dictionary_of_splits(read, tmp_path):
    for name, number in (("train", 9), ("validation", 2), ("test", 3)):
        save_to_disk(tmp_path / "data" / name, [{"messages": [ASKED, ANSWER]}] * number)
    (tmp_path / "data" / "dataset_dict.json").write_text('{"splits": ["train", "validation", "test"]}')
    counts, said = read({})
    assert counts == {"train": {"messages": 9}, "val": {"messages": 2}}
    assert "held out is the validation split" in said[-1]


def test_zstandard_that_was_cut(read):
    zstandard = pytest.importorskip("zstandard")
    whole = zstandard.compress("".join(f'{{"text": "{os.urandom(40).hex()}"}}\n' for _ in range(999)).encode())
    assert in_all(read({"a.jsonl.zst": whole * 2})[0]) == {"text": 1998}
    for damaged, reason in ((whole + whole[:-9], "it was cut"), (b"x" + whole, "Unknown frame")):
        with pytest.raises(DataError, match=rf"a\.jsonl\.zst cannot be read: .*{reason}"):
            read({"a.jsonl.zst": damaged})
