"""LoRA in the recipe hf: what is trained, saved and loaded, and that the base model is never touched."""

import dataclasses
import json
import os
import sys

import pytest
import torch
from adapters import import_peft, make_place, settings
from hugging import import_transformers
from safetensors.torch import load_file

import hvdtrain
from hvdtrain.errors import ConfigError, DataError, ResumeError
from hvdtrain.models.elsewhere import weights_digest
from hvdtrain.recipes import load_recipe
from hvdtrain.recipes.hf import TransformersConfig, hf
from hvdtrain.recipes.transformers_models.lora import Adapters, adapter_layers, add_adapters, merged_weights
from hvdtrain.rundir.trained import open_trained
from hvdtrain.settings.files import sha256_of
from hvdtrain.verbs.export import export
from hvdtrain.verbs.generate import generate
from hvdtrain.verbs.options import ExportOptions, GenerateOptions

peft, transformers = import_peft(), import_transformers()
pytestmark = pytest.mark.filterwarnings("default")  # transformers' and peft's own are none of ours


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Put back the variables that a start sets for its process."""
    for name in ("HOROVOD_FUSION_THRESHOLD", "MKL_NUM_THREADS", "OMPI_MCA_mpi_yield_when_idle"):
        monkeypatch.setenv(name, os.environ.get(name, "0"))


@pytest.fixture
def place(tmp_path):
    return make_place(tmp_path)


def load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def newest(run):
    return run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()


class KilledError(Exception):
    """What stands for a power failure."""


class Watch:
    """Sees the model that is trained, and may end the run at a step."""

    def __init__(self, dies_at=None):
        self.dies_at = dies_at

    def after_step(self, run):
        self.model = run.model
        if run.step == self.dies_at:
            raise KilledError


def watched(watch, recipe):
    """Return the recipe, with its training watched."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Watched(type(recipe)):
        """The same."""

        def build(self, say):
            return dataclasses.replace(super().build(say), callbacks=[watch])

    return Watched(**{item.name: getattr(recipe, item.name) for item in dataclasses.fields(recipe)})


def test_a_run_touches_no_base_weight_and_saves_adapters_alone(place):
    files = {path.name: sha256_of(path) for path in (place / "tiny").iterdir()}
    watch = Watch()
    hvdtrain.train(watched(watch, hf()), run_dir=place / "run", **settings(place, lora_rank=4, lora_dropout=0.1))
    assert {path.name: sha256_of(path) for path in (place / "tiny").iterdir()} == files
    trained = {name: p for name, p in watch.model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".lora_" in name for name in trained)
    assert any(bool(p.any()) for name, p in trained.items() if ".lora_B." in name)
    base = load(place / "tiny")
    for name, parameter in watch.model.named_parameters():
        if name not in trained:
            assert torch.equal(parameter, base.get_parameter(name.replace(".base_layer.", ".")))
    assert load_file(newest(place / "run") / "model.safetensors").keys() == trained.keys()
    states = torch.load(newest(place / "run") / "state.pt", weights_only=True)
    assert states["components"]["base_weights"]["sha256"] == weights_digest(base)
    moments = [entry["exp_avg"] for entry in states["optimizer"]["state"].values()]
    assert sum(moment.numel() for moment in moments) == sum(p.numel() for p in trained.values())


@pytest.mark.parametrize("recipe", ["hf", "dpo"])
def test_killed_and_resumed_is_bitwise_the_same(place, recipe):
    given = settings(place, "chats.jsonl" if recipe == "hf" else "pairs.jsonl", lora_rank=2, lora_dropout=0.1)
    hvdtrain.train(recipe, run_dir=place / "whole", **given)
    with pytest.raises(KilledError):
        hvdtrain.train(watched(Watch(dies_at=4), load_recipe(recipe)), run_dir=place / "run", **given)
    assert newest(place / "run").name == "step-00000003"
    hvdtrain.train(recipe, run_dir=place / "run", **given)
    weights = [(newest(place / run) / "model.safetensors").read_bytes() for run in ("run", "whole")]
    assert weights[0] == weights[1]
    ours, theirs = (torch.load(newest(place / run) / "state.pt", weights_only=True) for run in ("run", "whole"))
    if recipe == "dpo":  # computed once, before the first step
        a, b = (state["components"]["reference"]["log_probs"] for state in (ours, theirs))
        assert torch.equal(a, b)
        assert bool(a.isfinite().all())


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])  # gpt2's layers are no nn.Linear, qwen3's head is tied
def test_exports_load_in_peft_and_transformers(tmp_path, family, capsys):
    place = make_place(tmp_path, family)
    hvdtrain.train("hf", run_dir=place / "run", **settings(place, lora_rank=4))
    export(ExportOptions(run_dir=place / "run", output=place / "adapters"))
    export(ExportOptions(run_dir=place / "run", output=place / "merged", merged=True))
    assert "AutoPeftModelForCausalLM" in capsys.readouterr().out
    assert not (place / "merged" / "adapter_config.json").exists()
    assert not (place / "adapters" / "model.safetensors").exists()
    models = [
        peft.AutoPeftModelForCausalLM.from_pretrained(place / "adapters").eval(),
        load(place / "adapters"),
        load(place / "merged"),
    ]
    tokens = torch.randint(5, 200, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        losses = [float(model(input_ids=tokens, labels=tokens).loss) for model in models]
        before = float(load(place / "tiny")(input_ids=tokens, labels=tokens).loss)
        how = {"input_ids": tokens[:1, :5], "max_new_tokens": 8, "do_sample": False}
        texts = [model.generate(**how).tolist() for model in models]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)
    assert abs(before - losses[0]) > 1e-3
    assert texts[0] == texts[1] == texts[2]
    capsys.readouterr()
    said = set()
    for folder in ("run", "adapters", "merged"):
        generate(GenerateOptions(run_dir=place / folder, prompt=("hello 3",), chat=True, temperature=0.0, max_tokens=8))
        said.add(capsys.readouterr().out)
    assert len(said) == 1


def test_another_base_is_refused(place):
    given = settings(place, lora_rank=2)
    hvdtrain.train("hf", run_dir=place / "run", **given)
    export(ExportOptions(run_dir=place / "run", output=place / "adapters"))
    model = load(place / "tiny")
    with torch.no_grad():
        model.get_input_embeddings().weight[7, 3] += 1e-3
    model.save_pretrained(place / "tiny")
    given["train"]["steps"] = 9
    with pytest.raises(ResumeError, match="are not those that this run's adapters were trained beside"):
        hvdtrain.train("hf", run_dir=place / "run", **given)
    for folder in ("run", "adapters"):
        with pytest.raises(DataError, match="were trained beside: put these back"):
            generate(GenerateOptions(run_dir=place / folder, prompt=("hello",)))
    with pytest.raises(DataError, match="were trained beside: put these back"):
        export(ExportOptions(run_dir=place / "run", output=place / "merged", merged=True))
    assert not (place / "merged").exists()


def test_adapters_of_somebody_else_are_read(place, capsys):
    wrapped = peft.get_peft_model(load(place / "tiny"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    wrapped.save_pretrained(place / "theirs")
    (place / "theirs" / "README.md").unlink()
    transformers.AutoTokenizer.from_pretrained(place / "tiny").save_pretrained(place / "theirs")
    generate(GenerateOptions(run_dir=place / "theirs", prompt=("hello",), temperature=0.0, max_tokens=4))
    assert capsys.readouterr().out.startswith("hello")
    config = json.loads((place / "theirs" / "adapter_config.json").read_text())
    (place / "theirs" / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["k_proj"]}))
    with pytest.raises(DataError, match="do not fit"):
        generate(GenerateOptions(run_dir=place / "theirs", prompt=("hello",)))


def test_the_average_of_adapters_is_what_is_exported(place):
    given = settings(place, lora_rank=2)
    given["train"]["ema"] = 0.5
    hvdtrain.train("hf", run_dir=place / "run", **given)
    trained = open_trained(place / "run", "latest")
    assert "average" in trained.about
    assert trained.weights.keys() == load_file(newest(place / "run") / "model.safetensors").keys()


def test_shape_of_the_adapters(place):
    model = load(place / "tiny").train()
    digest = weights_digest(model)
    tokens = torch.arange(12)[None]
    before = model(input_ids=tokens).logits
    base = add_adapters(model, Adapters(3, 12.0, targets=("q_proj", "v_proj")), str(place / "tiny"), seed=5)
    assert base.sha256 == digest
    assert torch.equal(model(input_ids=tokens).logits, before)  # to begin with they add nothing
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(names) == 2 * 2 * 2
    assert {len(model.get_parameter(name)) for name in names if "lora_A" in name} == {3}
    with torch.no_grad():
        for name in names:
            model.get_parameter(name).normal_()
    moved = model(input_ids=tokens).logits
    layer = model.model.layers[0].self_attn.q_proj
    x = torch.randn(5, 32)
    added = x @ layer.lora_A.default.weight.T @ layer.lora_B.default.weight.T
    expected = x @ layer.base_layer.weight.T + 12.0 / 3 * added
    torch.testing.assert_close(layer(x), expected)
    for layer in adapter_layers(model):
        layer.enable_adapters(False)
    assert torch.equal(model(input_ids=tokens).logits, before)
    for layer in adapter_layers(model):
        layer.enable_adapters(True)
    assert torch.equal(model(input_ids=tokens).logits, moved)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == names
    whole = load(place / "tiny")
    missing, unknown = whole.load_state_dict(merged_weights(model), strict=False)
    assert not missing
    assert not unknown
    torch.testing.assert_close(whole(input_ids=tokens).logits, moved)


def test_the_first_factors_are_the_seeds(place):
    def first(seed):
        model = load(place / "tiny")
        add_adapters(model, Adapters(2, 4.0), str(place / "tiny"), seed)
        return model.model.layers[0].self_attn.q_proj.lora_A.default.weight

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"lora_targets": ("nothing",)}, r"linear layers are down_proj, gate_proj, k_proj, lm_head"),
        ({"lora_targets": ("q_proj", "nothing")}, "no layer of this model is called nothing"),
        ({"lora_targets": ("lm_head",)}, "the model's embedding or its output"),
        ({"lora_targets": ("embed_tokens",)}, "the model's embedding or its output"),
    ],
)
def test_layers_that_get_none(place, model, message):
    given = settings(place, lora_rank=2, **model)
    with pytest.raises(ConfigError, match=message):
        hvdtrain.train("hf", run_dir=place / "run", **given)


def test_settings_that_do_not_fit(place):
    with pytest.raises(ConfigError, match=r"needs --model\.path"):
        TransformersConfig(config=place / "tiny" / "config.json", lora_rank=2)
    with pytest.raises(ConfigError, match="do not go together"):
        TransformersConfig(path="tiny", lora_rank=2, resize_embeddings=True)
    unused = dict(TransformersConfig(path="tiny").unused())
    assert {"lora_alpha", "lora_dropout", "lora_targets"} <= unused.keys()
    assert not dict(TransformersConfig(path="tiny", lora_rank=2).unused())


def test_a_whole_model_is_not_merged(place):
    hvdtrain.train("hf", run_dir=place / "run", **settings(place, steps=1))
    with pytest.raises(ConfigError, match="--merged has no effect"):
        export(ExportOptions(run_dir=place / "run", merged=True))


def test_without_peft(place, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(DataError, match=r"--model\.lora-rank needs peft .*pip install 'hvdtrain\[hf\]'"):
        hvdtrain.train("hf", run_dir=place / "run", **settings(place, lora_rank=2))
