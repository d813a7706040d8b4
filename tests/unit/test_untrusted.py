"""Files of strangers: nothing waits, nothing grows, nothing outside is opened, no code runs."""

import dataclasses
import json
import os
import random
import threading
import time
import types

import pytest
from patience import wait_for
from safetensors.torch import save_file

from hvdtrain.data.text import chat
from hvdtrain.data.text.deadline import at_most
from hvdtrain.errors import DataError, UsageError
from hvdtrain.models.decoder import Decoder, DecoderConfig
from hvdtrain.models.interchange import load_decoder, read_shape, read_weights, to_llama
from hvdtrain.recipes.transformers_models.loading import check_files
from hvdtrain.settings.untrusted import file_in, read_bounded, read_json

CONFIG = DecoderConfig(num_layers=1, hidden_size=8, num_heads=2, intermediate_size=16)


@pytest.fixture
def exported(tmp_path):
    """A model as export writes it."""
    folder = tmp_path / "model"
    folder.mkdir()
    model = Decoder(CONFIG, 32)
    (folder / "config.json").write_text(json.dumps(to_llama(CONFIG, 32, 16, 0)))
    save_file({name: w.contiguous() for name, w in model.named_parameters()}, folder / "model.safetensors")
    return folder


def change(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def test_pipes_devices_and_long_files_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "long").write_bytes(b"x" * 101)
    started = time.monotonic()
    for path, says in (
        (tmp_path / "pipe", "is no regular file"),
        ("/dev/zero", "is no regular file"),
        (tmp_path, "is no regular file"),
        (tmp_path / "long", "has 101 bytes; such a file may have 100"),
        (tmp_path / "none", "cannot be read"),
        ("nul\0byte", "cannot be read"),
    ):
        with pytest.raises(DataError, match=says):
            read_bounded(tmp_path / path, 100)
    assert time.monotonic() - started < 30
    (tmp_path / "long").write_text("[" * 50_000)
    with pytest.raises(DataError, match="is not JSON"):
        read_json(tmp_path / "long")


def test_an_index_names_files_beside_it_only(exported):
    (exported.parent / "outside.safetensors").write_bytes((exported / "model.safetensors").read_bytes())
    for name in ("../outside.safetensors", str(exported.parent / "outside.safetensors"), "..", "", "/dev/zero", 3):
        with pytest.raises(DataError, match="not a file beside it"):
            file_in(exported, name)
    index = exported / "model.safetensors.index.json"
    for content in (
        '{"weight_map": {"a": "../outside.safetensors"}}',
        '{"weight_map": []}',
        "{}",
        '{"weight_map": {"a": 1}}',
    ):
        index.write_text(content)
        with pytest.raises(DataError):
            read_weights(exported)
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    assert len(read_weights(exported)) > 3


@pytest.mark.parametrize(
    "name", ["model.safetensors.index.json", "pytorch_model.bin.index.json", "model.safetensors.index.fp16.json"]
)
def test_no_index_that_transformers_would_follow_names_files_elsewhere(tmp_path, name):
    os.mkfifo(tmp_path / "pipe")  # it would be waited for
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / name).write_text('{"weight_map": {"a": "../pipe"}}')
    with pytest.raises(DataError, match="not a file beside it"):
        check_files(str(tmp_path / "model"))


@pytest.mark.parametrize(
    "values",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 5000},
        {"vocab_size": 2**26},
        {"hidden_size": 2**20, "head_dim": 2**19},
        {"intermediate_size": 2**24},
        {"num_attention_heads": 0},
        {"num_attention_heads": "2"},
        {"hidden_size": None},
        {"hidden_size": True},
        {"rope_theta": "x", "rope_parameters": {}},
        {"rope_parameters": []},
        {"rope_parameters": [1]},
        {"rms_norm_eps": {"a": 1}},
        {"rms_norm_eps": -1e-6},
        {"rope_theta": 0, "rope_parameters": {}},
    ],
    ids=str,
)
def test_sizes_are_bounded_before_memory_is_taken(exported, values):
    assert read_shape(exported).vocab_size == 32
    change(exported, **values)
    if values == {"rope_parameters": []}:
        assert read_shape(exported).config.rope_theta == 10000.0
        return
    with pytest.raises(UsageError) as refused:
        read_shape(exported)
    assert "config.json" in str(refused.value)


def test_a_norm_without_eps_stays_one(exported):
    config = dataclasses.replace(CONFIG, norm_eps=0.0)
    change(exported, **to_llama(config, 32, 16, 0))
    assert read_shape(exported).config.norm_eps == 0.0
    change(exported, rms_norm_eps=None)
    assert read_shape(exported).config.norm_eps == 1e-6  # transformers' own default


def test_odd_configurations_are_one_sentence(exported):
    """Seeded: any field with any odd value ends in a sentence or in a model, never in a traceback."""
    odd = [None, [], {}, "", "x", -1, 0, 1.5, True, 2**70, [[]], {"a": 1}, "\0"]
    good = (exported / "config.json").read_text()
    draw, refused = random.Random(0), []
    for _ in range(400):
        values = json.loads(good)
        for name in draw.sample(sorted(values), draw.randint(1, 3)):
            values[name] = draw.choice(odd)
        (exported / "config.json").write_text(json.dumps(values))
        try:
            shape = read_shape(exported)
            load_decoder(Decoder(shape.config, shape.vocab_size), exported)
        except UsageError as error:
            refused.append(str(error))
    assert refused
    assert max(map(len, refused)) < 500


def test_a_template_may_not_run_for_ever(monkeypatch):
    """It is a program: two nested loops of the longest allowed range take hours."""
    jinja = pytest.importorskip("jinja2.sandbox")
    source = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    template = jinja.ImmutableSandboxedEnvironment().from_string(source)
    tokenizer = types.SimpleNamespace(
        all_special_tokens=[],
        chat_template=source,
        apply_chat_template=lambda messages, **more: template.render(messages=messages),
    )
    monkeypatch.setattr(chat, "_SECONDS_A_TEMPLATE", 0.5)
    talk = ({"role": "user", "content": "x"}, {"role": "assistant", "content": "y"})
    started = time.monotonic()
    with pytest.raises(DataError, match="the chat template takes more than"):
        chat.ChatTemplate(tokenizer).passages(chat.Conversation(talk, (False, True)))
    assert time.monotonic() - started < 60
    with pytest.raises(DataError, match="that is no template"):
        chat.check_template("x" * 2_000_000, "here")


def test_a_limit_that_is_not_reached_leaves_nothing_behind():
    before = threading.active_count()
    for _ in range(200):
        with at_most(60, DataError("too long")):
            pass
    wait_for(lambda: threading.active_count() <= before + 1)
    with pytest.raises(ValueError, match="mine"), at_most(60, DataError("too long")):
        raise ValueError("mine")


@pytest.mark.parametrize("family", ["gpt2"])
def test_code_of_a_model_is_not_run(tmp_path, monkeypatch, family):
    """Whatever standard input says."""
    from hugging import import_transformers

    import_transformers()
    from hvdtrain.recipes.hf import TransformersConfig, hf

    folder = tmp_path / "stranger"
    folder.mkdir()
    (folder / "own.py").write_text(
        "from pathlib import Path\nPath(__file__).with_name('ran').touch()\n"
        "from transformers import PretrainedConfig\nclass Own(PretrainedConfig):\n    model_type = 'own'\n"
    )
    auto = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own", "AutoTokenizer": ["own.Own", None]}
    (folder / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": auto}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Own", "auto_map": auto}))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(readline=lambda: "y\n", isatty=lambda: True))
    import dataclasses

    recipe = dataclasses.replace(hf(), model=TransformersConfig(path=str(folder)))
    with pytest.raises(DataError, match=r"--model\.trust-remote-code"):
        recipe.build(lambda text: None)
    assert not list(tmp_path.rglob("ran"))
