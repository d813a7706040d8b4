"""Files of tokens: types, headers, shards, and what contradicts itself."""

import numpy as np
import pytest
import torch

from hvdtrain.data.config import TextConfig
from hvdtrain.data.text.stream import prepare_text
from hvdtrain.data.text.tokenizer import train_bpe
from hvdtrain.data.text.windows import IGNORED, Shard, TokenWindows
from hvdtrain.errors import DataError
from hvdtrain.models.config import DecoderConfig
from hvdtrain.recipes.lm import LanguageModel, StreamConfig

GENERATOR = np.random.default_rng(0)
SMALL = GENERATOR.integers(0, 50_257, 2_000)
LARGE = GENERATOR.integers(0, 152_000, 2_000)


def header(magic, version, count):
    numbers = np.zeros(256, np.int32)
    numbers[:3] = magic, version, count
    return numbers.tobytes()


def prepare(tmp_path, content, vocab_size=152_000, name="train.bin", **settings):
    (tmp_path / name).write_bytes(content)
    np.arange(300, dtype=np.uint16).tofile(tmp_path / "val.bin")
    config = TextConfig(
        path=str(tmp_path / "train.bin" if name == "train.bin" else tmp_path / "train_*.bin"),
        val_path=str(tmp_path / "val.bin"),
        vocab_size=vocab_size,
        cache_dir=str(tmp_path / "cache"),
        sequence_length=16,
        **settings,
    )
    return prepare_text(config)


def all_tokens(shards):
    """Return every token: the first, and all that are predicted."""
    windows = TokenWindows(shards, 16)
    tokens, targets = windows.batch(torch.arange(len(windows)))
    assert windows.num_targets(torch.arange(len(windows))) == int((targets != IGNORED).sum())
    return [int(tokens[0, 0]), *targets[targets != IGNORED].tolist()]


@pytest.mark.parametrize(
    ("tokens", "dtype", "head"),
    [
        (SMALL, "uint16", b""),
        (SMALL, "uint32", b""),
        (LARGE, "uint32", b""),
        (SMALL, "uint16", header(20240520, 1, 2_000)),
        (LARGE, "uint32", header(20240801, 7, 2_000)),
    ],
)
def test_types_are_recognised(tokens, dtype, head, tmp_path):
    text = prepare(tmp_path, head + tokens.astype(dtype).tobytes())
    assert text.num_train_tokens == 2_000
    assert text.train_shards[0].dtype == dtype
    assert all_tokens(text.train_shards) == tokens.tolist()


def test_the_type_can_be_asked_for(tmp_path):
    text = prepare(tmp_path, SMALL.astype(np.uint32).tobytes(), token_type="uint16")
    assert text.num_train_tokens == 4_000


@pytest.mark.parametrize(
    ("content", "settings", "message"),
    [
        (header(20240520, 1, 9) + SMALL.astype(np.uint16).tobytes(), {}, "has 9 tokens, and has 2,000: it was cut"),
        (
            header(20240520, 1, 2_000) + SMALL.astype(np.uint16).tobytes(),
            {"token_type": "uint32"},
            "its tokens are uint16, not --data.token-type uint32",
        ),
        (SMALL.astype(np.uint32).tobytes() + b"\0\0", {"token_type": "uint32"}, "no multiple of 4"),
        (LARGE.astype(np.uint32).tobytes(), {"vocab_size": 50_257}, "--data.vocab-size 15"),
    ],
)
def test_contradictions_are_refused(content, settings, message, tmp_path):
    with pytest.raises(DataError, match=message):
        prepare(tmp_path, content, **settings)


def test_shards_are_one_stream(tmp_path):
    parts = np.split(SMALL.astype(np.uint16), [3, 4, 700])
    for i, part in enumerate(parts):
        (tmp_path / f"train_{i}.bin").write_bytes(part.tobytes())
    text = prepare(tmp_path, parts[0].tobytes(), name="train_0.bin")
    assert len(text.train_shards) == 4
    assert all_tokens(text.train_shards) == SMALL.tolist()
    (tmp_path / "whole.bin").write_bytes(SMALL.astype(np.uint16).tobytes())
    one, several = TokenWindows([Shard(tmp_path / "whole.bin", "uint16")], 16), TokenWindows(text.train_shards, 16)
    for indices in (torch.tensor([0]), torch.tensor([43, 0, 124])):
        assert all(map(torch.equal, one.batch(indices), several.batch(indices)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (SMALL.astype(np.int64).tobytes(), r"numbers of 64 bits: write tokens as uint16 or uint32.*astype"),
        (b"some words of a text\n" * 90, "holds text, not tokens"),
        ("Wörter einer Sprache\n".encode() * 90, "holds text, not tokens"),
        (header(20240520, 2, 2_000) + SMALL.astype(np.uint16).tobytes(), "header of llm.c of version 2, which is not"),
        (b"\x93NUMPY\x01\x00" + SMALL.astype(np.uint16).tobytes(), "array of numpy or torch, not tokens alone"),
        (b"PK\x03\x04" + SMALL.astype(np.uint16).tobytes(), "an archive or an array"),
        (SMALL.astype(np.float32).tobytes(), "--data.token-type says otherwise"),
    ],
)
def test_what_is_no_file_of_tokens_is_told(content, message, tmp_path):
    """All of their bytes may be tokens: they were trained on as such."""
    with pytest.raises(DataError, match=message):
        prepare(tmp_path, content, vocab_size=60_000)


@pytest.mark.parametrize("largest", [5, 64, 257])
@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_tokens_of_a_small_vocabulary_are_tokens(largest, dtype, tmp_path):
    tokens = GENERATOR.integers(0, largest, 2_000)
    text = prepare(tmp_path, tokens.astype(dtype).tobytes())
    assert all_tokens(text.train_shards) == tokens.tolist()


def test_a_tokenizer_says_what_tokens_mean(tmp_path):
    pytest.importorskip("tokenizers")
    words = train_bpe(iter(["one two three four " * 99]), 280)
    words.save(tmp_path)
    tokens = words.encode("one two three four " * 500).astype(np.uint16)
    given = {"tokenizer": str(tmp_path / "tokenizer.json"), "vocab_size": 300}
    text = prepare(tmp_path, tokens.tobytes(), **given)
    assert text.tokenizer.decode(tokens[:6].tolist()).startswith("one two")
    assert (text.vocab_size, text.num_val_bytes) == (300, None)
    assert text.content_hash == prepare(tmp_path, tokens.tobytes(), vocab_size=300).content_hash
    with pytest.raises(DataError, match=f"the vocabulary has {words.vocab_size}:"):  # the held-out ones go up to 299
        prepare(tmp_path, tokens.tobytes(), **{**given, "vocab_size": 257})
    recipe = LanguageModel(
        model=DecoderConfig(num_layers=1, hidden_size=16, num_heads=2),
        data=StreamConfig(
            path=str(tmp_path / "train.bin"), val_path=str(tmp_path / "val.bin"), sequence_length=16, **given
        ),
    )
    folder = tmp_path / "written"
    folder.mkdir()
    (tmp_path / "train.bin").write_bytes(tokens.tobytes())
    task = recipe.build(print)
    task.write_model_files(folder)
    assert (folder / "tokenizer.json").is_file()
    assert task.samples(task.model, {})["text"]


def test_held_out_tokens_that_are_trained_on_are_told(tmp_path):
    said = []
    for name in ("a_train.bin", "b_train.bin", "c_val.bin", "d_val.bin"):
        GENERATOR.integers(0, 50_000, 300).astype(np.uint16).tofile(tmp_path / name)
    settings = {"vocab_size": 50_257, "cache_dir": str(tmp_path / "cache"), "sequence_length": 16}
    for path in ("*.bin", "*_train.bin"):
        prepare_text(TextConfig(path=f"{tmp_path}/{path}", val_path=f"{tmp_path}/*_val.bin", **settings), said.append)
    (line,) = [line for line in said if "trained on" in line]
    assert line.startswith(f"2 of 2 held-out files are trained on, too: {tmp_path}/c_val.bin, ")
