"""What is known of files: computed once, and never wrong."""

import json
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest

from hvdtrain.data.config import TextConfig
from hvdtrain.data.text import known
from hvdtrain.data.text.known import KnownFiles
from hvdtrain.data.text.stream import prepare_text


class Reader:
    """Values are what the files hold; notes which were read."""

    def __init__(self, folder):
        self.files = {name: folder / name for name in ("a", "b")}
        self.read = []

    def __call__(self, name):
        self.read.append(name)
        return self.files[name].read_text()


@pytest.fixture
def reader(tmp_path, monkeypatch):
    monkeypatch.setattr(known, "_SETTLED_NS", 0)
    for name in ("a", "b"):
        (tmp_path / name).write_text(f"this is {name}")
    time.sleep(0.02)
    return Reader(tmp_path)


def values(reader, tmp_path):
    return KnownFiles(tmp_path / "cache", "corpus").values(reader.files, reader)


def test_a_second_time_nothing_is_read(reader, tmp_path):
    first = values(reader, tmp_path)
    assert first == {"a": "this is a", "b": "this is b"}
    assert reader.read == ["a", "b"]
    assert values(reader, tmp_path) == first
    assert reader.read == ["a", "b"]


def write(path, text):
    path.write_text(text)


def write_with_old_time(path, text):
    times = path.stat()
    path.write_text(text)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def replace_with_old_time(path, text):
    times = path.stat()
    path.with_suffix(".new").write_text(text)
    os.utime(path.with_suffix(".new"), ns=(times.st_atime_ns, times.st_mtime_ns))
    path.with_suffix(".new").replace(path)


@pytest.mark.parametrize("change", [write, write_with_old_time, replace_with_old_time])
def test_a_change_of_the_same_length_is_noticed(reader, tmp_path, change):
    values(reader, tmp_path)
    time.sleep(0.02)
    change(reader.files["b"], "that is b")
    assert values(reader, tmp_path)["b"] == "that is b"
    assert reader.read == ["a", "b", "b"]


def test_what_changes_while_it_is_read_is_not_remembered(reader, tmp_path):
    def read_and_change(name):
        value = reader(name)
        if name == "b" and len(reader.read) == 2:
            write(reader.files["b"], "that is b")
        return value

    KnownFiles(tmp_path / "cache", "corpus").values(reader.files, read_and_change)
    assert values(reader, tmp_path)["b"] == "that is b"


def test_a_file_that_has_just_changed_is_not_remembered(reader, tmp_path, monkeypatch):
    monkeypatch.setattr(known, "_SETTLED_NS", 10**12)
    values(reader, tmp_path)
    values(reader, tmp_path)
    assert reader.read == ["a", "b"] * 2


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"format": 1}', '{"format": 0, "entries": {}}'])
def test_a_damaged_memory_is_made_anew(reader, tmp_path, damage):
    first = values(reader, tmp_path)
    (memory,) = (tmp_path / "cache" / "known").glob("*.json")
    assert json.loads(memory.read_text())["entries"]
    memory.write_text(damage)
    assert values(reader, tmp_path) == values(reader, tmp_path) == first
    assert reader.read == ["a", "b"] * 2


def test_a_directory_that_cannot_be_written_costs_time_only(reader, tmp_path):
    (tmp_path / "cache").write_text("in the way")
    files = KnownFiles(tmp_path / "cache", "corpus")
    assert files.values(reader.files, reader) == files.values(reader.files, reader) == values(reader, tmp_path)
    assert not files.can_keep


def _read_in_a_process(folder):
    reader = Reader(Path(folder))
    found = KnownFiles(Path(folder) / "cache", "corpus").values(reader.files, reader)
    return found, len(reader.read)


def test_of_several_processes_one_reads(reader, tmp_path):
    for path in reader.files.values():
        os.utime(path, ns=(0, 0))
    time.sleep(known._SETTLED_NS / 1e9 + 3.2)  # in the other processes the true time counts
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        found = pool.map(_read_in_a_process, [str(tmp_path)] * 2, chunksize=1)
    assert sorted(count for _, count in found) == [0, 2]
    assert found[0][0] == found[1][0] == {"a": "this is a", "b": "this is b"}


@pytest.mark.parametrize("path", ["corpus", "corpus/one.txt", "train.bin"])
def test_a_start_reads_no_text_again(tmp_path, monkeypatch, path):
    """What was prepared once is found though nobody may read the text any more; a change is noticed."""
    monkeypatch.setattr(known, "_SETTLED_NS", 0)
    (tmp_path / "corpus").mkdir()
    for name in ("corpus/one.txt", "corpus/two.txt"):
        (tmp_path / name).write_bytes(b"one line of text\n" * 20)
    for name in ("train.bin", "val.bin"):
        (tmp_path / name).write_bytes(np.arange(1000, 1200, dtype=np.uint16).tobytes())
    time.sleep(0.02)
    more = {"val_path": str(tmp_path / "val.bin"), "vocab_size": 2**16} if path == "train.bin" else {}
    config = TextConfig(path=str(tmp_path / path), cache_dir=str(tmp_path / "cache"), sequence_length=8, **more)
    first = prepare_text(config).content_hash
    opened = []
    original = Path.open
    monkeypatch.setattr(
        Path, "open", lambda self, *args, **kwargs: opened.append(self) or original(self, *args, **kwargs)
    )
    assert prepare_text(config).content_hash == first
    corpus = [place.name for place in opened if place.suffix == ".bin" or "corpus" in place.parts]
    # A single file is looked at, to find the line where to cut it; a file of tokens, for its header.
    assert corpus in ([], ["one.txt", "one.txt"], ["train.bin", "val.bin"])
    (tmp_path / "corpus" / "one.txt").write_bytes(b"one line of gold\n" * 20)
    (tmp_path / "train.bin").write_bytes(np.arange(1001, 1201, dtype=np.uint16).tobytes())
    assert prepare_text(config).content_hash != first
