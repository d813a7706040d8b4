"""The text of a continuation as its tokens come, and the files that carry a model."""

import dataclasses
import io
import json
import math
import os
import random
import re
import resource
import shutil
import types

import pytest
import torch
from hugging import import_transformers
from tiny_models import make_model

from hvdtrain import cli
from hvdtrain.data.text.tokenizer import BpeTokenizer, ByteTokenizer, load_bpe, train_bpe, write_tokenizer
from hvdtrain.errors import ConfigError, DataError
from hvdtrain.models.config import DecoderConfig
from hvdtrain.models.decoder import Decoder
from hvdtrain.models.interchange import Shape, load_decoder, read_shape, to_llama
from hvdtrain.models.weights import model_weights
from hvdtrain.recipes import lm_task
from hvdtrain.rundir.directory import RunDirectory
from hvdtrain.rundir.manifest import Manifest
from hvdtrain.rundir.retention import Retention
from hvdtrain.rundir.trained import open_trained
from hvdtrain.verbs.export import write_model
from hvdtrain.verbs.generate import Continuation, load_model
from hvdtrain.verbs.kit import standard_input

TEXT = "naïve 日本語 🙂 \x00\x7f\xad\u0100 def f(x):\n\treturn x  # ok\r\n"


class Bytes(ByteTokenizer):
    """Text of bytes."""

    end = 256


def stream(text, stop=(), end=False):
    """Return what is shown after each token, and at the end."""
    continuation = Continuation(Bytes(), stop)
    shown = []
    for token in [*text.encode(), *([256] if end else [])]:
        done = continuation.add(token)
        shown.append(continuation.take())
        if done:
            break
    return shown, continuation.finish()


def test_characters_come_whole():
    shown, rest = stream("aé🙂b")
    assert shown == ["a", "", "é", "", "", "", "🙂", "b"]
    assert rest == ""
    assert stream("é")[0] == ["", "é"]


def test_a_character_that_is_cut_off_comes_at_the_end():
    continuation = Continuation(Bytes(), ())
    continuation.add("é".encode()[0])
    assert continuation.take() == ""
    assert continuation.finish() == "\N{REPLACEMENT CHARACTER}"


def test_a_stop_text_ends_it_and_is_not_shown():
    shown, rest = stream("one two three", stop=["two", "xyz"])
    assert "".join(shown) + rest == "one "
    assert len(shown) == len("one two")
    assert stream("one tw", stop=["two"])[1] == "tw"  # held back until it was clear


def test_the_end_of_the_text_ends_it():
    shown, rest = stream("abc", end=True)
    assert "".join(shown) + rest == "abc"


def metaspace():
    """A tokenizer whose text depends on what came before: it drops the space at the beginning."""
    library = pytest.importorskip("tokenizers")
    words = ["<|endoftext|>", *(f"\u2581{word}" for word in ("a", "man", "it")), "s", "ing", "."]
    inner = library.Tokenizer(library.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="."))
    inner.decoder = library.decoders.Metaspace()
    return BpeTokenizer(inner, "words")


@pytest.mark.parametrize("kind", ["bytes", "bpe", "metaspace"])
def test_text_that_comes_is_the_text_of_all_tokens(kind):
    """Also of bytes that are no characters, and a stop text that comes late is found."""
    tokenizer = {"bytes": ByteTokenizer, "bpe": lambda: train_bpe(iter([TEXT] * 3), 290), "metaspace": metaspace}[
        kind
    ]()
    tokenizer.end = tokenizer.eot
    source = random.Random(1)
    for _ in range(20):
        tokens = [token for _ in range(400) if (token := source.randrange(tokenizer.vocab_size)) != tokenizer.eot]
        text = tokenizer.decode(tokens)
        stop = re.search("[^\N{REPLACEMENT CHARACTER}]{2}", text[250:]).group()
        for stops, expected in (([], text), ([stop], text[: text.index(stop)])):
            taken, kept = Continuation(tokenizer, stops), Continuation(tokenizer, stops)
            shown = ""
            for token in tokens:
                is_done = taken.add(token)
                assert kept.add(token) == is_done
                shown += taken.take()
                if is_done:
                    break
            assert shown + taken.finish() == kept.finish() == expected


def test_a_token_costs_the_same_however_long_the_text_is():
    counts = []

    class Counting(Bytes):
        def decode(self, tokens):
            counts.append(len(tokens))
            return super().decode(tokens)

    continuation = Continuation(Counting(), ["never there"])
    for token in (TEXT * 50).encode():
        continuation.add(token)
        continuation.take()
    assert max(counts) < 40


def test_bytes_are_a_bpe_without_merges(tmp_path):
    write_tokenizer(ByteTokenizer(), tmp_path, 64)
    written = load_bpe(tmp_path / "tokenizer.json")
    assert (written.vocab_size, written.eot) == (257, 256)
    assert written.encode(TEXT).tolist() == ByteTokenizer().encode(TEXT).tolist()
    assert written.decode(list(TEXT.encode())) == TEXT
    everything = bytes(range(256)).decode("latin-1")
    assert written.decode(written.encode(everything).tolist()) == everything


def write_files(folder, model, vocab_size):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(to_llama(model.config, vocab_size, 32, 256)))
    write_tokenizer(ByteTokenizer(), folder, 32)


def save(run_dir, model, **about):
    manifest = Manifest(samples=0, world_size=1, **about)
    RunDirectory(run_dir).checkpoints.save(manifest, model_weights(model), {}, Retention())


CONFIGS = [
    DecoderConfig(num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=2, rope_theta=500.0),
    DecoderConfig(num_layers=1, hidden_size=32, num_heads=2, tie_embeddings=False, intermediate_size=48, norm_eps=1e-6),
]


@pytest.mark.parametrize("config", CONFIGS, ids=["tied", "untied"])
def test_there_and_back(tmp_path, config):
    model = Decoder(config, 257, seed=3)
    run_dir = tmp_path / "run"
    write_files(run_dir / "model", model, 257)
    save(run_dir, model, step=5)
    trained = open_trained(run_dir, "latest")
    write_model(trained.folder, trained.weights, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    ]
    shape = read_shape(tmp_path / "out")
    settled = {"num_kv_heads": config.kv_heads, "intermediate_size": config.feed_forward_size}
    assert shape == Shape(dataclasses.replace(config, **settled), 257, 32, 256, 256)
    copy = Decoder(config, 257, seed=4)
    load_decoder(copy, tmp_path / "out")
    tokens = torch.randint(257, (2, 9), generator=torch.Generator().manual_seed(0))
    expected = model(tokens)
    assert torch.equal(copy(tokens), expected)
    for where in (run_dir, tmp_path / "out"):
        loaded = load_model(open_trained(where, "latest"), shape)
        assert torch.equal(loaded(tokens), expected)


def test_transformers_computes_the_same(tmp_path):
    transformers = import_transformers()
    for i, config in enumerate(CONFIGS):
        model = Decoder(config, 257, seed=3)
        write_files(tmp_path / str(i) / "model", model, 257)
        write_model(tmp_path / str(i) / "model", model_weights(model), tmp_path / str(i) / "out")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / str(i) / "out").eval()
        tokens = torch.randint(256, (2, 20), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            assert (theirs(tokens).logits - model(tokens)).abs().max() < 1e-5
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / str(i) / "out")
        assert tokenizer(TEXT)["input_ids"] == list(TEXT.encode())
        assert tokenizer.decode(list(TEXT.encode())) == TEXT
        assert (tokenizer.eos_token_id, tokenizer.bos_token_id) == (256, 256)


def test_checkpoints_by_name(tmp_path):
    model = Decoder(CONFIGS[0], 257)
    write_files(tmp_path / "run" / "model", model, 257)
    for step, loss in ((5, 1.0), (10, 2.0)):
        save(tmp_path / "run", model, step=step, val_loss=loss)
    names = {which: open_trained(tmp_path / "run", which).source[-8:] for which in ("latest", "best", "5", "10")}
    assert names == {"latest": "00000010", "best": "00000005", "5": "00000005", "10": "00000010"}
    with pytest.raises(DataError, match="no checkpoint '7': there are of steps 5, 10; say latest, best or a step"):
        open_trained(tmp_path / "run", "7")
    (tmp_path / "run" / "checkpoints" / "step-00000005" / "model.safetensors").write_bytes(b"x")
    with pytest.raises(DataError, match=r"is damaged.*choose another one with --checkpoint"):
        open_trained(tmp_path / "run", "best")
    with pytest.raises(DataError, match="neither a run's directory"):
        open_trained(tmp_path, "latest")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "type 'gpt2'.*recipe hf"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"hidden_act": "gelu"}, "hidden_act = gelu"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rotary positions of type llama3"),
        ({"head_dim": 64}, "head_dim = 64"),
    ],
)
def test_what_the_decoder_cannot_be_is_named(tmp_path, change, message):
    (tmp_path / "config.json").write_text(json.dumps({**to_llama(CONFIGS[0], 257, 32, None), **change}))
    with pytest.raises(DataError, match=message):
        read_shape(tmp_path)


def test_weights_that_do_not_fit_are_named(tmp_path):
    model = Decoder(CONFIGS[0], 257)
    write_files(tmp_path / "model", model, 257)
    weights = model_weights(model)
    del weights["model.norm.weight"]
    write_model(tmp_path / "model", weights, tmp_path / "out")
    with pytest.raises(DataError, match=r"see model\.norm\.weight"):
        load_decoder(model, tmp_path / "out")
    with pytest.raises(DataError, match="is not there"):
        load_model(open_trained(tmp_path / "out", "latest"), read_shape(tmp_path / "out"))


def test_a_trained_bpe_survives(tmp_path):
    trained = train_bpe(iter(["hello world, hello there"] * 20), 300)
    write_tokenizer(trained, tmp_path, 64)
    again = load_bpe(tmp_path / "tokenizer.json")
    assert again.encode("hello you").tolist() == trained.encode("hello you").tolist()
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["eos_token"] == "<|endoftext|>"


@pytest.mark.parametrize("kind", ["link", "fifo"])
def test_an_export_copies_what_lies_there_and_nothing_else(tmp_path, kind):
    model = Decoder(CONFIGS[0], 257)
    write_files(tmp_path / "model", model, 257)
    (tmp_path / "secret").write_text("mine")
    odd = tmp_path / "model" / "notes.txt"
    odd.symlink_to(tmp_path / "secret") if kind == "link" else os.mkfifo(odd)
    with pytest.raises(DataError, match=r"notes\.txt is no regular file"):
        write_model(tmp_path / "model", model_weights(model), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    odd.unlink()
    (tmp_path / "model" / "additional_chat_templates").mkdir()  # as transformers writes several
    (tmp_path / "model" / "additional_chat_templates" / "tool_use.jinja").write_text("{{ x }}")
    write_model(tmp_path / "model", model_weights(model), tmp_path / "out")
    assert len({path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir() if path.is_file()}) == 1
    assert (tmp_path / "out" / "additional_chat_templates" / "tool_use.jinja").read_text() == "{{ x }}"


@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    """Return the directory of a run, in the working directory."""
    monkeypatch.chdir(tmp_path)
    model = Decoder(CONFIGS[0], 257, seed=3)
    write_files(tmp_path / "run" / "model", model, 257)
    (tmp_path / "run" / "logs").mkdir()
    save(tmp_path / "run", model, step=5)
    return tmp_path / "run"


def exported(*words):
    return cli.parse(["export", *map(str, words)]).run()


@pytest.mark.parametrize(
    "place",
    [
        "run",
        "run/checkpoints",
        "run/checkpoints/step-00000005",
        "run/model",
        "run/logs",
        ".",
        "..",
        "other",
        "copy of a checkpoint",
    ],
)
def test_an_export_takes_the_place_of_an_earlier_one_only(run_dir, tmp_path, place):
    """Also where it is asked to overwrite: a checkpoint has a model.safetensors, too."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    shutil.copytree(run_dir / "checkpoints" / "step-00000005", tmp_path / "copy of a checkpoint")
    (run_dir / "logs" / "rank-000.log").touch()
    before = sorted(tmp_path.rglob("*"))
    for more in ([], ["--overwrite"]):
        with pytest.raises(ConfigError, match="--output"):
            exported("run", "--output", place, *more)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_file_or_a_link_to_nothing_in_the_place_of_an_export_is_said(run_dir, tmp_path):
    (run_dir / "export").touch()
    with pytest.raises(ConfigError, match="export is no directory"):
        exported("run")
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(ConfigError, match="link is a link to something that is not there"):
        exported("run", "--output", "link")


def test_an_export_goes_where_a_link_leads(run_dir, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    for more in ([], ["--overwrite"]):
        assert exported("run", "--output", "link", *more) == 0
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "real" / "model.safetensors").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real", "run"]


def test_an_export_to_a_full_disk_is_a_sentence_and_the_earlier_one_stays(run_dir, tmp_path):
    assert exported("run", "--output", "out") == 0
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(ConfigError, match="out cannot be written"):
            exported("run", "--output", "out", "--overwrite")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def test_standard_input_that_is_no_text_is_refused(monkeypatch):
    for errors in ("strict", "surrogateescape"):  # of the C locale
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"abc\xff"), "utf-8", errors))
        with pytest.raises(DataError, match=r"standard input is no UTF-8 text \(byte 3\)"):
            standard_input()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("\ufeffü".encode()), "utf-8"))
    assert standard_input() == "ü"


@pytest.mark.parametrize("prompts", [["x" * 99], ["x", "x" * 99], ["x" * 99, "x"]])
def test_a_prompt_that_is_refused_is_not_printed(tmp_path, capsys, monkeypatch, prompts):
    """It stood there as though it had been continued."""
    monkeypatch.setenv("HOROVOD_FUSION_THRESHOLD", "0")  # which each start sets
    import_transformers()
    make_model(tmp_path, "gpt2")
    words = [word for prompt in prompts for word in ("--prompt", prompt)]
    assert cli.main(["generate", str(tmp_path), *words]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "positions for 64: shorten it" in said.err


def test_a_model_that_is_broken_ends_no_run_that_has_finished():
    """Its training is over and kept: the sample of its text says why there is none."""
    model = Decoder(DecoderConfig(num_layers=1, hidden_size=8, num_heads=2), 257)
    torch.nn.init.constant_(model.lm_head.weight, math.nan)
    said = lm_task.written_sample(model, types.SimpleNamespace(tokenizer=ByteTokenizer()), 8)
    assert said.startswith("(nothing: the model's logits are not finite")
