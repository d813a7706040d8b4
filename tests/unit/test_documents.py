"""Records of many formats and files, what is held out of them, and what a person is shown."""

import gzip
import json

import pytest
from hugging import import_transformers
from templates import make_chat_tokenizer

from hvdtrain.data.config import CorpusConfig
from hvdtrain.data.text.documents import DocumentReader
from hvdtrain.data.text.formats import recognise
from hvdtrain.data.text.packed import PackedDocuments, write_packed
from hvdtrain.data.text.records import kind_of, read_records
from hvdtrain.data.text.show import show_samples
from hvdtrain.data.text.sources import find_sources
from hvdtrain.errors import DataError

import_transformers()
pytestmark = pytest.mark.filterwarnings("default")  # transformers' own are none of ours
ASKED = {"role": "user", "content": "hello world"}
ANSWER = {"role": "assistant", "content": "how are you"}
FORMATS = {
    "messages": {"messages": [ASKED, ANSWER]},
    "ShareGPT": {"conversations": [{"from": "human", "value": "hello world"}, {"from": "gpt", "value": "how are you"}]},
    "prompt/completion": {"prompt": "hello world ", "completion": "how are you"},
    "Alpaca": {"instruction": "hello", "input": "world", "output": "how are you"},
    "text": {"text": "how are you"},
}


def sources(tmp_path, path="data", **settings):
    said = []
    config = CorpusConfig(path=str(tmp_path / path), cache_dir=str(tmp_path / "cache"), **settings)
    return find_sources(config, said.append), said


def read(tmp_path, on_error="stop", field="text", name="train", **settings):
    """Return the documents, what is learned of each, and the reader."""
    tokenizer = make_chat_tokenizer("bytes", "chatml")
    reader = DocumentReader(tokenizer, field, on_error)
    documents = list(reader.read(sources(tmp_path, **settings)[0][name]))
    return [tokenizer.decode(document.tokens[document.is_target]) for document in documents], reader


def write_lines(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in records))
    return path


@pytest.mark.parametrize("format", FORMATS)
def test_formats_are_known_by_their_fields(format, tmp_path):
    assert recognise(FORMATS[format], "text").format == format
    write_lines(tmp_path / "data" / "a.jsonl", [FORMATS[format]])
    write_lines(tmp_path / "val.jsonl", [FORMATS["text"]])
    (learned,), reader = read(tmp_path, val_path=str(tmp_path / "val.jsonl"))
    end = "<|im_end|>" if format in ("messages", "ShareGPT", "Alpaca") else "</s>"
    assert learned.strip() in (
        f"how are you{end}",
        f"ow are you{end}",
    )  # without <s>, a text's first token is not predicted
    assert reader.describe() == {"formats": {format: 1}, "num_skipped": 0, "skipped": [], "without": {}}


def test_prompt_and_completion_can_be_messages():
    found = recognise({"prompt": [ASKED, ANSWER, ASKED], "completion": [ANSWER]}, "text").content
    assert found.is_learned == (False, False, False, True)


def test_another_field_is_a_text():
    assert recognise({"body": "x", "messages": []}, "body").content == "x"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"other": 1}, "the fields other are those of no format"),
        ([1], "an object with fields, not a list"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "from 'alien', not one of human"),
        ({"prompt": "x", "completion": [ANSWER]}, "two texts, or two lists"),
        ({"messages": [ASKED, ANSWER], "tools": "{"}, "'tools' is no JSON"),
    ],
)
def test_records_of_no_format(record, message):
    with pytest.raises(DataError, match=message):
        recognise(record, "text")


def test_a_record_that_cannot_be_used_is_named_or_skipped(tmp_path):
    bad = ["{", '{"messages": [{"role": "user", "content": "\\ud83d"}, {"role": "assistant", "content": "x"}]}']
    write_lines(tmp_path / "data" / "a.jsonl", [FORMATS["text"], *bad, FORMATS["text"]])
    write_lines(tmp_path / "val.jsonl", [FORMATS["text"]])
    settings = {"val_path": str(tmp_path / "val.jsonl")}
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: not JSON .*; --data\.on-error skip"):
        read(tmp_path, **settings)
    learned, reader = read(tmp_path, on_error="skip", **settings)
    assert len(learned) == 2
    assert reader.num_skipped == 2
    assert "line 3: half of a surrogate pair" in reader.skipped[1]


def test_kinds_of_files(tmp_path):
    lines = json.dumps(FORMATS["text"]) + "\n"
    for name, content, kind in (
        ("a.jsonl", lines, "lines"),
        ("a.JSONL", "\ufeff" + lines, "lines"),
        ("a.ndjson", lines, "lines"),
        ("a.json", json.dumps([FORMATS["text"]] * 2, indent=1), "array"),
        ("b.json", lines * 2, "lines"),
        ("c.txt", lines * 2, "lines"),  # what looks like JSON is none of text
        ("d.txt", "[" + lines + "]", "array"),
        ("e.txt", "{ is a brace\n", None),
        ("f.py", "[1, 2]\n", None),
    ):
        path = tmp_path / name
        path.write_text(content)
        assert kind_of(path) == kind, name
        if kind:
            values = [json.loads(raw) if isinstance(raw, str) else raw for _, raw in read_records(path, kind)]
            assert values in ([FORMATS["text"]], [FORMATS["text"]] * 2)
    with gzip.open(tmp_path / "g.jsonl.gz", "wt") as file:
        file.write(lines)
    assert kind_of(tmp_path / "g.jsonl.gz") == "lines"
    assert len(list(read_records(tmp_path / "g.jsonl.gz", "lines"))) == 1


def test_parquet_and_arrow(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.Table.from_pylist([{"messages": [ASKED, ANSWER]}] * 3)
    parquet.write_table(table, tmp_path / "a.parquet")
    with pyarrow.ipc.new_stream(str(tmp_path / "b.arrow"), table.schema) as stream:
        stream.write_table(table)
    with pyarrow.ipc.new_file(str(tmp_path / "c.arrow"), table.schema) as file:
        file.write_table(table)
    for name in ("a.parquet", "b.arrow", "c.arrow"):
        path = tmp_path / name
        found = list(read_records(path, kind_of(path)))
        assert found == [(f"{path}, row {n}", {"messages": [ASKED, ANSWER]}) for n in (1, 2, 3)]
    (tmp_path / "d.parquet").write_text("x")
    with pytest.raises(DataError, match=r"d\.parquet cannot be read"):
        list(read_records(tmp_path / "d.parquet", "parquet"))


def test_zstandard(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstandard.compress(json.dumps(FORMATS["text"]).encode()))
    assert [json.loads(raw) for _, raw in read_records(path, kind_of(path))] == [FORMATS["text"]]


def test_records_are_held_out_by_hash(tmp_path):
    records = [{"text": f"text {i}"} for i in range(400)]
    write_lines(tmp_path / "data" / "a.jsonl", records + records[:50])

    def parts():
        return [read(tmp_path, name=name, val_fraction=0.1)[0] for name in ("train", "val")]

    train, held_out = parts()
    assert len(train) + len(held_out) == 450
    assert not set(train) & set(held_out)  # equal records are never apart
    assert 20 < len(held_out) < 80
    # Not the end of the file; and what is held out stays so when the file grows.
    write_lines(tmp_path / "data" / "a.jsonl", [{"text": f"more {i}"} for i in range(400)] + records)
    assert set(held_out) <= set(parts()[1])


def test_one_record_is_always_held_out(tmp_path):
    write_lines(tmp_path / "data" / "a.jsonl", [{"text": f"text {i}"} for i in range(5)])
    assert [len(read(tmp_path, name=name, val_fraction=0.001)[0]) for name in ("train", "val")] == [4, 1]


def test_what_stands_beside_the_data_is_left_out(tmp_path):
    write_lines(tmp_path / "data" / "a.jsonl", [FORMATS["text"]] * 9)
    (tmp_path / "data" / "README.md").write_text("about these data")
    found, said = sources(tmp_path)
    assert [source.document.name for source in found["train"]] == ["a.jsonl"]
    assert said == [f"left out beside the data in {tmp_path / 'data'}: README.md"]


def test_a_byte_order_mark_is_none_of_a_text(tmp_path):
    (tmp_path / "data").mkdir()
    for name in "ab":
        (tmp_path / "data" / f"{name}.txt").write_text("\ufeffhow are you")
    (learned,), _ = read(tmp_path)
    assert learned.endswith("ow are you</s>")
    assert "\ufeff" not in learned


def test_samples_are_shown(tmp_path):
    write_lines(tmp_path / "data" / "a.jsonl", [FORMATS["messages"]] * 9)
    tokenizer = make_chat_tokenizer("bytes", "chatml")
    reader = DocumentReader(tokenizer, "text", "stop")
    parts = sources(tmp_path, val_path=str(tmp_path / "data"))[0]
    folder = write_packed(tmp_path, "x", {name: lambda part=part: reader.read(part) for name, part in parts.items()})
    shown = show_samples(PackedDocuments(folder, "train", 64), tokenizer, 1)
    head, first, *_ = shown.splitlines()
    assert "tokens are learned" in head
    assert first.replace("|", "").replace("][", "").strip() == (
        r"<im_start>user\nhello world<im_end>\n<im_start>assistant\n[how are you<im_end>]"
    )
