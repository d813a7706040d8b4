"""Text: which files, how they are split, tokens on disk, windows."""

import dataclasses
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from hvdtrain.data.config import TextConfig
from hvdtrain.data.text import known
from hvdtrain.data.text.corpus import PIECE_BYTES, Document, find_documents, split_documents, standard_library
from hvdtrain.data.text.sources import find_sources
from hvdtrain.data.text.splits import such_as
from hvdtrain.data.text.stream import prepare_text
from hvdtrain.data.text.tokenize import Meter
from hvdtrain.data.text.tokenizer import ByteTokenizer, train_bpe
from hvdtrain.data.text.windows import IGNORED, Shard, TokenWindows
from hvdtrain.errors import ConfigError, DataError, megabytes
from hvdtrain.recipes import lm_task


@pytest.fixture
def corpus(tmp_path):
    """Six small files; `b.txt` is empty and `d.txt` is not UTF-8."""
    folder = tmp_path / "corpus"
    (folder / "sub").mkdir(parents=True)
    for name, content in {
        "a.txt": "alpha " * 20,
        "b.txt": "",
        "c.txt": "gämma 漢字 " * 20,
        "e.txt": "epsilon\n" * 20,
        "sub/f.txt": "zeta " * 20,
    }.items():
        (folder / name).write_text(content, encoding="utf-8")
    (folder / "d.txt").write_bytes(b"\xff\xfe\x00broken")
    return folder


def config(corpus, tmp_path, **more):
    return TextConfig(**{"path": str(corpus), "cache_dir": str(tmp_path / "cache"), "sequence_length": 8, **more})


def documents_in(path):
    """Split a byte-token stream at its ends of text."""
    tokens = np.fromfile(path, np.uint16)
    assert tokens[0] == tokens[-1] == 256
    cuts = np.flatnonzero(tokens == 256)
    return [bytes(tokens[a + 1 : b].astype(np.uint8)) for a, b in itertools.pairwise(cuts)]


def test_every_document_is_there_once_and_whole(corpus, tmp_path):
    text = prepare_text(config(corpus, tmp_path))
    found = documents_in(text.train_shards[0].path) + documents_in(text.val_shards[0].path)
    expected = [(corpus / name).read_bytes() for name in ("a.txt", "c.txt", "e.txt", "sub/f.txt")]
    assert sorted(found) == sorted(expected)
    assert documents_in(text.val_shards[0].path)
    assert text.num_train_bytes + text.num_val_bytes == sum(map(len, expected))
    assert text.num_train_tokens == text.num_train_bytes + len(documents_in(text.train_shards[0].path)) + 1
    assert text.vocab_size == 257
    assert text.train_text_path == text.train_shards[0].path


def test_a_second_time_reads_the_cache(corpus, tmp_path):
    first = prepare_text(config(corpus, tmp_path))
    stamp = first.train_shards[0].path.stat().st_mtime_ns
    said = []
    assert prepare_text(config(corpus, tmp_path), said.append).content_hash == first.content_hash
    assert first.train_shards[0].path.stat().st_mtime_ns == stamp
    assert not [line for line in said if "prepared" in line]


CHANGES = {
    "cut": lambda path: os.truncate(path, path.stat().st_size - 8),
    "bit": lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]),
    "gone": os.unlink,
    "pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "brackets": lambda path: path.write_text("[" * 50_000),
}


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize(
    "name", ["train.bin", "val.bin", "meta.json", "tokenizer.json", "train.bytes.bin", "seal.json"]
)
def test_prepared_text_that_was_changed_is_prepared_again(corpus, tmp_path, name, how):
    asked = config(corpus, tmp_path, tokenizer="bpe", vocab_size=300)
    first = prepare_text(asked)
    folder = first.train_shards[0].path.parent
    written = {path.name: path.read_bytes() for path in folder.iterdir()}
    CHANGES[how](folder / name)
    said = []
    again = prepare_text(asked, said.append)
    assert again.num_train_tokens == first.num_train_tokens
    assert all((folder / name).read_bytes() == written[name] for name in written.keys() - {"seal.json"})
    assert any(line.startswith(f"warning: {folder} was changed") for line in said)
    assert prepare_text(asked, said.append).content_hash == first.content_hash


def test_a_copy_of_prepared_text_is_as_good(corpus, tmp_path):
    """Its times and inodes are others, its content is not."""
    prepare_text(config(corpus, tmp_path))
    shutil.copytree(tmp_path / "cache", tmp_path / "copy")
    said = []
    prepare_text(config(corpus, tmp_path, cache_dir=str(tmp_path / "copy")), said.append)
    assert not [line for line in said if line.startswith(("warning", "prepared"))]


@pytest.mark.parametrize("how", CHANGES)
def test_what_is_known_of_files_is_not_taken_from_a_damaged_memory(corpus, tmp_path, how):
    for path in corpus.rglob("*.txt"):
        os.utime(path, ns=(10**18, 10**18))
    first = prepare_text(config(corpus, tmp_path))
    for path in (tmp_path / "cache" / "known").glob("*.json"):
        CHANGES[how](path)
    assert prepare_text(config(corpus, tmp_path)).content_hash == first.content_hash


def test_a_file_that_may_not_be_read_is_an_error(corpus, tmp_path, monkeypatch):
    """Not one without text; to root all files are open."""
    opened = Path.open

    def closed(path, *how):
        if path.name == "f.txt":
            raise PermissionError(13, "Permission denied")
        return opened(path, *how)

    monkeypatch.setattr(Path, "open", closed)
    for find in (prepare_text, find_sources):
        with pytest.raises(DataError, match=r"f.txt cannot be read \(Permission denied\)"):
            find(config(corpus, tmp_path), print)


@pytest.mark.parametrize("pattern", ["", "**/*.txt", "*/*.txt", "s*/*"])
def test_a_directory_that_may_not_be_read_is_an_error(corpus, monkeypatch, pattern):
    """Not what is left out in silence. To root all directories are open: the system's answers are changed instead."""
    scandir, access = os.scandir, os.access

    def closed(folder):
        if Path(folder).name == "sub":
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", closed)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "sub" and access(path, mode))
    with pytest.raises(DataError, match=r"sub of the data cannot be listed \(Permission denied\)"):
        find_documents(str(corpus / pattern))


@pytest.mark.parametrize("change", ["content", "name", "tokenizer", "split"])
def test_whatever_changes_the_tokens_changes_the_hash(corpus, tmp_path, change):
    before = prepare_text(config(corpus, tmp_path)).content_hash
    more = {}
    if change == "content":
        (corpus / "a.txt").write_text("beta " * 20)
    elif change == "name":
        (corpus / "a.txt").rename(corpus / "z.txt")
    elif change == "tokenizer":
        more = {"tokenizer": "bpe", "vocab_size": 300}
    else:
        more = {"val_fraction": 0.9}
    assert prepare_text(config(corpus, tmp_path, **more)).content_hash != before


def test_the_place_of_the_corpus_does_not_matter(corpus, tmp_path):
    before = prepare_text(config(corpus, tmp_path))
    moved = corpus.rename(tmp_path / "elsewhere")
    assert prepare_text(config(moved, tmp_path)).content_hash == before.content_hash


@pytest.mark.slow
def test_processes_prepare_once(corpus, tmp_path):
    """Four processes at the same time: one says that it worked, all find the same, nothing half is left."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(4) as pool:
        results = pool.starmap(_prepare, [(str(corpus), str(tmp_path))] * 4)
    assert len({result[0] for result in results}) == 1
    assert sum("prepared" in " ".join(result[1]) for result in results) == 1
    assert not list((tmp_path / "cache").glob("*writing*"))


def _prepare(corpus, tmp_path):
    said = []
    text = prepare_text(config(Path(corpus), Path(tmp_path)), said.append)
    return text.content_hash, said


def test_a_failed_preparation_leaves_nothing(corpus, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hvdtrain.data.text.stream._write_split", full)
    with pytest.raises(DataError, match="No space left"):
        prepare_text(config(corpus, tmp_path))
    assert [path.suffix for path in (tmp_path / "cache").iterdir() if path.name != "known"] == [".lock"]


def test_bpe_round_trip(corpus, tmp_path):
    text = prepare_text(config(corpus, tmp_path, tokenizer="bpe", vocab_size=300))
    assert text.vocab_size <= 300
    for path, bytes_path in (
        (text.train_shards[0].path, text.train_text_path),
        (text.val_shards[0].path, text.val_text_path),
    ):
        tokens = np.fromfile(path, np.uint16)
        cuts = np.flatnonzero(tokens == text.tokenizer.eot)
        decoded = [text.tokenizer.decode(tokens[a + 1 : b]).encode() for a, b in itertools.pairwise(cuts)]
        assert decoded == documents_in(bytes_path)
    saved = config(corpus, tmp_path, tokenizer=str(text.train_shards[0].path.parent / "tokenizer.json"))
    again = prepare_text(saved)
    assert np.array_equal(
        np.fromfile(again.train_shards[0].path, np.uint16), np.fromfile(text.train_shards[0].path, np.uint16)
    )


@pytest.mark.parametrize("sample", ["", "a", "def f(x):\n\treturn  x", "naïve 漢字 🙂\u0000\r\n", " \u00a0 x"])
def test_tokenizers_lose_nothing(corpus, tmp_path, sample):
    bpe = prepare_text(config(corpus, tmp_path, tokenizer="bpe", vocab_size=300)).tokenizer
    for tokenizer in (ByteTokenizer(), bpe):
        assert tokenizer.decode(tokenizer.encode(sample)) == sample
        assert tokenizer.eot not in tokenizer.encode(sample)


def test_windows_predict_each_token_once(tmp_path):
    tokens = np.arange(100, 130, dtype=np.uint16)
    tokens.tofile(tmp_path / "t.bin")
    windows = TokenWindows([Shard(tmp_path / "t.bin", "uint16")], 8)
    assert len(windows) == 4
    x, y = windows.batch(torch.tensor([0, 3, 1, 2]))
    assert x.shape == y.shape == (4, 8)
    assert x.dtype == y.dtype == torch.int64
    assert x[0].tolist() == list(range(100, 108))
    assert y[0].tolist() == list(range(101, 109))
    assert y[1].tolist() == [125, 126, 127, 128, 129, IGNORED, IGNORED, IGNORED]
    assert sorted(y[y != IGNORED].tolist()) == list(range(101, 130))
    assert windows.num_targets(torch.tensor([0, 1])) == 16
    assert windows.num_targets(torch.tensor([3])) == 5
    assert windows.num_targets(torch.arange(4)) == 29


def test_the_split_is_by_file_and_stable():
    documents = [Document(f"{i}.py", Path(f"{i}.py")) for i in range(400)]
    train, held_out = split_documents(documents, 0.1)
    assert 20 <= len(held_out) <= 60
    assert not {d.name for d in train} & {d.name for d in held_out}
    more = [*documents, *(Document(f"new{i}.py", Path("x")) for i in range(50))]
    assert {d.name for d in held_out} <= {d.name for d in split_documents(more, 0.1)[1]}
    for few in (documents[:2], documents[:3]):
        assert all(split_documents(few, 0.001))
        assert all(split_documents(few, 0.999))


@pytest.mark.parametrize("content", ["line of text\n" * 100, "é" * 500])
def test_a_single_file_is_cut_between_characters(tmp_path, content):
    path = tmp_path / "one.txt"
    path.write_text(content, encoding="utf-8")
    (first,), (second,) = split_documents(find_documents(str(path)), 0.1)
    assert "".join([*first.pieces(), *second.pieces()]) == content
    assert 0.02 < len("".join(second.pieces())) / len(content) < 0.15
    if "\n" in content:
        assert "".join(second.pieces()).startswith("line")


def test_globs_and_hidden_files(corpus):
    (corpus / ".git").mkdir()
    (corpus / ".git" / "config").write_text("hidden")
    assert [d.name for d in find_documents(str(corpus))] == ["a.txt", "b.txt", "c.txt", "d.txt", "e.txt", "sub/f.txt"]
    assert [d.name for d in find_documents(str(corpus / "**" / "[af].txt"))] == ["a.txt", "sub/f.txt"]


def test_the_standard_library_is_a_corpus():
    names = [document.name for document in standard_library()]
    assert "threading.py" in names
    assert "json/decoder.py" in names
    assert Path(threading.__file__).read_text(encoding="utf-8") == "".join(
        standard_library()[names.index("threading.py")].pieces()
    )
    assert not [name for name in names if "site-packages" in name or name.startswith("test/")]
    assert names == sorted(names)


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("corpsu", "did you mean 'corpus'"),
        ("corpus/*.md", "no file matches"),
        ("corpus/d.txt", r"not UTF-8 text \(byte 0\)"),
        ("corpus/b.txt", "holds no UTF-8 text"),
        ("hollow", "holds no files"),
        ("corpus/a.txt", "fewer than one sample"),
    ],
)
def test_unusable_text_is_explained(corpus, tmp_path, path, says):
    (tmp_path / "hollow").mkdir()
    with pytest.raises(DataError, match=says):
        prepare_text(config(tmp_path / path, tmp_path, sequence_length=64))


def test_token_files_are_taken_as_they_are(tmp_path):
    for name in ("train", "val"):
        np.arange(50, dtype=np.uint16).tofile(tmp_path / f"{name}.bin")
    settings = {"val_path": str(tmp_path / "val.bin"), "vocab_size": 257}
    text = prepare_text(config(tmp_path / "train.bin", tmp_path, **settings))
    assert (text.num_train_tokens, text.vocab_size, text.tokenizer, text.num_val_bytes) == (50, 257, None, None)
    assert text.train_shards[0].path == tmp_path / "train.bin"
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["known"]  # no copy of the tokens


@pytest.mark.parametrize(
    ("content", "val", "says"),
    [
        (b"\1\0\2", "val.bin", "no multiple of 2"),
        (b"\xff\xff" * 50, "val.bin", "--data.vocab-size 65536"),
        (b"\1\0" * 50, None, "--data.val-path"),
        (b"\1\0" * 50, "gone.bin", "gone.bin does not exist"),
        (b"", "val.bin", "fewer than one sample"),
    ],
)
def test_wrong_token_files_are_explained(tmp_path, content, val, says):
    (tmp_path / "train.bin").write_bytes(content)
    (tmp_path / "val.bin").write_bytes(b"\1\0" * 50)
    with pytest.raises(DataError, match=says):
        prepare_text(config(tmp_path / "train.bin", tmp_path, val_path=val and str(tmp_path / val), vocab_size=300))


@pytest.mark.parametrize(("content", "says"), [(None, "neither byte, bpe"), ("{}", "is not a tokenizer.json")])
def test_wrong_tokenizers_are_explained(corpus, tmp_path, content, says):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=says):
        prepare_text(config(corpus, tmp_path, tokenizer=str(path)))


def test_a_tokenizer_without_end_of_text_is_refused(corpus, tmp_path):
    text = prepare_text(config(corpus, tmp_path, tokenizer="bpe", vocab_size=300))
    path = tmp_path / "tokenizer.json"
    path.write_text(
        (text.train_shards[0].path.parent / "tokenizer.json").read_text().replace("<|endoftext|>", "<|other|>")
    )
    assert json.loads(path.read_text())
    with pytest.raises(DataError, match="no end-of-text token"):
        prepare_text(config(corpus, tmp_path, tokenizer=str(path)))


def test_missing_tokenizers_library(corpus, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(DataError, match="pip install tokenizers"):
        prepare_text(config(corpus, tmp_path, tokenizer="bpe"))


@pytest.mark.parametrize("wrong", [{"sequence_length": 0}, {"val_fraction": 1.0}, {"vocab_size": 100}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ConfigError):
        TextConfig(**wrong)


def test_a_file_comes_in_pieces_that_end_with_a_line_or_a_character(tmp_path):
    lines = "".join(f"naïve line {i} 日本\n" for i in range(90_000))
    one_line = "é🙂" * 700_000
    for content in (lines, one_line, "\n" * (1 << 22) + "x"):
        (tmp_path / "big.txt").write_text(content, encoding="utf-8")
        pieces = list(Document("big.txt", tmp_path / "big.txt").pieces())
        assert "".join(pieces) == content
        assert len(pieces) > 1
        assert max(len(piece.encode()) for piece in pieces) < 2.1 * PIECE_BYTES
        if content is lines:
            assert all(piece.endswith("\n") for piece in pieces)


def test_a_byte_that_is_not_utf_8_is_named_in_any_piece(tmp_path):
    path = tmp_path / "late.txt"
    path.write_bytes(b"good line\n" * 300_000 + b"\xff")
    with pytest.raises(DataError, match=r"byte 3,000,000"):
        prepare_text(TextConfig(path=str(path), cache_dir=str(tmp_path)))
    assert Document("late.txt", path).digest() is None


def test_tokens_do_not_depend_on_how_many_texts_are_read_ahead(tmp_path, monkeypatch):
    for i in range(5):
        (tmp_path / f"{i}.txt").write_text(f"document {i} says hello\n" * (20 * i + 1))
    (tmp_path / "empty.txt").write_text("")
    told = []
    tokens = []
    for ahead, cache in ((0, "a"), (4, "b")):
        monkeypatch.setattr("hvdtrain.data.text.tokenizer._TEXTS_AHEAD", ahead)
        monkeypatch.setattr("hvdtrain.data.text.tokenize._SAY_EVERY_S", 0.0)
        config = TextConfig(path=str(tmp_path / "*.txt"), tokenizer="bpe", vocab_size=300, sequence_length=8)
        prepared = prepare_text(dataclasses.replace(config, cache_dir=str(tmp_path / cache)), told.append)
        tokens.append(prepared.train_shards[0].path.read_bytes())
    assert tokens[0] == tokens[1]
    assert any(re.fullmatch(r"tokenising: [\d.]+ kB in \d+ s(, [\d.,]+ MB/s)?", line) for line in told)


def test_a_small_text_is_not_0_0_mb_and_its_rate_is_not_that_of_the_start(monkeypatch):
    told = []
    meter = Meter(told.append)
    meter.add(24_600)
    assert str(meter) == "24.6 kB in 0 s"
    assert (megabytes(20), megabytes(999_999)) == ("20 B", "1,000.0 kB")
    monkeypatch.setattr("hvdtrain.data.text.tokenize.time.monotonic", lambda: meter._started + 4)
    meter.add(12_000_000)
    assert str(meter) == "12.0 MB in 4 s, 3.0 MB/s"


def test_of_a_text_too_short_to_be_split_it_is_said_what_to_give(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("some words of a text\n" * 20)
    with pytest.raises(
        DataError, match=r"held-out .* 23 tokens, .* a larger --data.val-fraction \(it is 0.05\), --data"
    ):
        prepare_text(config(path, tmp_path, sequence_length=32))
    other = tmp_path / "b.txt"
    other.write_text("few words")
    with pytest.raises(DataError, match=r"held-out .*: use more text, or a smaller --data.sequence-length"):
        prepare_text(config(path, tmp_path, sequence_length=32, val_path=str(other)))


def test_texts_are_tokenised_ahead_in_order_and_not_all_at_once():
    tokenizer = train_bpe(iter(["one two three"] * 9), 280)
    taken = []

    def texts():
        for i in range(1000):
            taken.append(i)
            yield f"one two three {i} " * (1 + i % 7)

    tokens = tokenizer.encode_each(texts())
    first = next(tokens)
    assert first.tolist() == tokenizer.inner.encode("one two three 0 ").ids
    assert len(taken) <= 4 * os.cpu_count() + 1
    assert [len(one) for one in tokens] == [len(tokenizer.inner.encode(text).ids) for text in texts()][1:]


def test_who_stops_early_leaves_no_thread_behind():
    tokens = train_bpe(iter(["one two three"] * 9), 280).encode_each(iter(["one"] * 100))
    next(tokens)
    tokens.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("tokenise")]


def test_the_baseline_is_fitted_to_a_part_of_a_large_text_and_says_so(corpus, tmp_path, monkeypatch):
    text = prepare_text(config(corpus, tmp_path))
    whole = lm_task.compare_with_trigrams({"val/bits_per_byte": 2.0}, text)
    assert "MB" not in whole
    assert re.search(r"this model +2\.000 +1\.386\n", whole)
    monkeypatch.setattr(lm_task, "_TRIGRAM_SYMBOLS", text.num_val_tokens)
    assert whole.splitlines()[-1] != lm_task.compare_with_trigrams({"val/bits_per_byte": 2.0}, text).splitlines()[-1]
    assert "(fitted to the first 0 of 0 MB)" in lm_task.compare_with_trigrams({"val/bits_per_byte": 2.0}, text)
    monkeypatch.setattr(lm_task, "_TRIGRAM_SYMBOLS", 50)
    assert "(fitted to the first 0 of 0 MB, tested on the first 0 of 0 MB)" in lm_task.compare_with_trigrams(
        {"val/bits_per_byte": 2.0}, text
    )


def test_the_baseline_is_counted_once_for_a_text(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(known, "_SETTLED_NS", 0)
    text, counted = prepare_text(config(corpus, tmp_path)), []
    fit = lm_task.TrigramModel.fit
    monkeypatch.setattr(lm_task.TrigramModel, "fit", lambda symbols: counted.append(len(symbols)) or fit(symbols))
    shown = [lm_task.compare_with_trigrams({"val/bits_per_byte": 2.0}, text) for _ in range(3)]
    assert len(set(shown)) == len(counted) == 1
    monkeypatch.setattr(lm_task, "_TRIGRAM_SYMBOLS", 50)
    assert lm_task.compare_with_trigrams({"val/bits_per_byte": 2.0}, text) != shown[0]
    assert counted[1:] == [50]
    monkeypatch.undo()
    monkeypatch.setattr(known, "_SETTLED_NS", 0)
    for path in (text.train_text_path, text.val_text_path):  # whichever changes, it is counted anew
        symbols = np.fromfile(path, np.uint16)
        path.write_bytes(symbols[::-1].tobytes())
        counts = lm_task.TrigramModel.fit(np.fromfile(text.train_text_path, np.uint16))
        asked = np.fromfile(text.val_text_path, np.uint16)
        expected = counts.nats(asked) / int((asked < 256).sum()) / math.log(2)
        assert f"{expected:13.3f}" in lm_task.compare_with_trigrams({"val/bits_per_byte": 2.0}, text).splitlines()[-1]


def test_an_end_of_text_by_another_name(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "<|bos|>": 1, "?": 2}, unk_token="?"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text").mkdir()
    for name in "xy":
        (tmp_path / "text" / name).write_text("a " * 9)
    settings = {"path": str(tmp_path / "text"), "cache_dir": str(tmp_path / "cache"), "sequence_length": 4}
    config = TextConfig(**settings, tokenizer=str(tmp_path / "tokenizer.json"))
    with pytest.raises(
        DataError, match=r"has no end-of-text token of the names .*: give its own, as in --data\.end-of"
    ):
        prepare_text(config)
    with pytest.raises(DataError, match=r"--data\.end-of-text: .*tokenizer\.json has no token '<s>'"):
        prepare_text(dataclasses.replace(config, end_of_text="<s>"))
    for _ in range(2):  # made, and found in the cache
        text = prepare_text(dataclasses.replace(config, end_of_text="<|bos|>"))
        assert text.tokenizer.eot == 1
        assert text.num_train_tokens == 11
        assert np.fromfile(text.train_shards[0].path, np.uint16).tolist() == [1, *[0] * 9, 1]


def test_files_of_records_are_no_texts(corpus, tmp_path):
    (corpus / "more.jsonl").write_text('{"text": "hello"}\n')
    said = []
    settings = {"cache_dir": str(tmp_path / "cache"), "sequence_length": 4}
    prepare_text(TextConfig(path=str(corpus), **settings), said.append)
    assert f"left out 1 of 7 files of {corpus}, being records, for the recipe hf: more.jsonl" in said
    assert f"left out 1 of 6 files of {corpus}, not being UTF-8 text: d.txt" in said
    assert such_as(["a", "b", "c", "d"]) == ", such as a, b, c"
    with pytest.raises(DataError, match=r"more\.jsonl holds records, and this recipe takes texts: the recipe hf"):
        prepare_text(TextConfig(path=str(corpus / "more.jsonl"), **settings))


def test_runs_below_the_texts_are_none_of_them(corpus, tmp_path):
    """As after `--data.path .`: each run was trained on the logs of those before, and went on with other data."""
    plain, said = prepare_text(config(corpus, tmp_path)), []
    for name, sign in (("mine", "logs"), ("sweep", "sweep.json"), ("sweep/trial-0", "metrics.jsonl")):
        folder = corpus / "runs" / name
        (folder / "logs").mkdir(parents=True)
        (folder / "logs" / "rank-000.log").write_text("what a rank has to say\n" * 20)
        (folder / sign).touch()
        (folder / "lock").touch()
    (corpus / "runs" / "a.md").write_text("a text\n")
    for path in (f"{corpus}", f"{corpus}/**"):
        said.clear()
        text = prepare_text(config(path, tmp_path), said.append)
        assert any("of runs" in line for line in said)
        assert text.num_train_tokens + text.num_val_tokens == plain.num_train_tokens + plain.num_val_tokens + 8
    alone = prepare_text(config(corpus / "runs" / "mine", tmp_path))  # a person has named it
    assert alone.num_train_tokens > 100
