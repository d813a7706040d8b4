"""Each setting, given another value, changes something that can be seen from outside, or is refused, or is said.

A new field without a line here fails: say what it may be, beside what else, and it is tried on a small run.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from portraits import differences, portrait, small, task_portrait
from test_components import job_of
from test_without_effect import with_setting

from hvdtrain.errors import ConfigError
from hvdtrain.optim.table import OPTIMIZERS, settings_class
from hvdtrain.recipes import load_recipe
from hvdtrain.settings.fields import fields_of
from hvdtrain.trainer import memory
from hvdtrain.trainer.memory import checked_estimate

# Setting -> another value, or several; and what else is given, where it is refused alone.
SHARED = {
    "train.steps": 5,
    "train.epochs": 1.0,
    "train.global_batch_size": 6,
    "train.micro_batch_size": 2,
    "train.accum_steps": 2,
    "train.max_time": "1s",  # since this process began
    "train.seed": 1,
    "train.precision": ("bf16", "fp16", "bf16-true", "fp64"),
    "train.max_grad_norm": (0.1, None),
    "train.ema": 0.5,
    "optim.name": ("sgd", "muon", "lars", "lamb", "NAdam"),
    "optim.peak_lr": 0.01,
    "optim.lr_rule": ("sqrt", {"optim.lr_rule": "linear", "optim.reference_batch": 8}),
    "optim.reference_batch": (16, {"optim.lr_rule": "sqrt", "optim.reference_batch": 8}),
    "optim.schedule": ("linear", "constant", "wsd", "step", "multistep", "plateau"),
    "optim.warmup_steps": 3,
    "optim.warmup_fraction": 0.5,
    "optim.final_lr_fraction": 0.5,
    "optim.decay_fraction": (0.7, {"optim.schedule": "wsd"}),
    "optim.decay_factor": (0.5, {"optim.schedule": "multistep"}),
    "optim.step_fraction": (0.5, {"optim.schedule": "step"}),
    "optim.milestones": ((0.5,), {"optim.schedule": "multistep"}),
    "optim.nesterov": (True, {"optim.name": "sgd", "optim.momentum": 0.5}),
    "optim.trust": (0.5, {"optim.name": "lars"}),
    "optim.weight_decay": 0.5,
    "optim.shard": True,
    "optim.offload": "cpu",
    "optim.beta1": 0.5,
    "optim.beta2": 0.5,
    "optim.eps": 0.1,
    "optim.kernel": ("foreach", "loop"),
    "optim.momentum": (0.5, {"optim.name": "sgd"}),
    "optim.embedding_lr_factor": (3.0, {"optim.name": "muon"}),
    "comm.compression": ("fp16", "bf16", "int8", "powersgd:2", "topk:0.1"),
    "comm.compression_min_size": (10, {"comm.compression": "int8"}),
    "comm.compression_warmup_steps": (3, {"comm.compression": "topk:0.1"}),
    "comm.compression_exact": ("*weight", {"comm.compression": "int8"}),
    "comm.bucket_mib": 3,
    "comm.op": "adasum",
    "comm.sync": "local",
    "comm.period": (3, {"comm.sync": "local"}),
    "comm.sync_warmup_steps": (2, {"comm.sync": "local", "comm.period": 2}),
    "comm.outer": ("nesterov", {"comm.sync": "local"}),
    "comm.outer_lr": (0.5, {"comm.sync": "local"}),
    "comm.outer_momentum": (0.5, {"comm.sync": "local", "comm.outer": "nesterov"}),
    "comm.fragments": (2, {"comm.sync": "local"}),
    "comm.overlap_steps": (2, {"comm.sync": "local"}),
    "comm.overlap_rule": ("delayed", {"comm.sync": "local", "comm.overlap_steps": 2}),
    "comm.overlap_mix": (0.1, {"comm.sync": "local", "comm.overlap_steps": 2}),
    "log.every": 2,
    "log.grad_norms": True,
    "log.tensorboard": True,
    "eval.every": (3, None),
    "eval.batch_size": 2,
    "eval.patience": 1,
    "checkpoint.every": (5, None),
    "checkpoint.keep_last": (1, None),
    "checkpoint.keep_every": 2,
    "health.stall_limit": "1m",
    "health.max_skipped_steps": 1,
    "health.replica_check_every": (1, None),
    "health.noise_scale": True,
    "profile.timeline": "2:3",
    "health.slow_rank": (2.0, None),
    "model.sync_batch_norm": True,
    "model.compile": ("model", "blocks"),
    "model.checkpoint_blocks": True,
    "data.ahead": 3,
}
# `auto` of model.linear and of train.precision is one of the others, by the processor.
ONE_OF = {"model.linear": ("torch", "onednn")}
LM = {
    "model.num_layers": 1,
    "model.hidden_size": 16,
    "model.num_heads": 4,
    "model.num_kv_heads": 1,
    "model.intermediate_size": 64,
    "model.rope_theta": 100.0,
    "model.norm_eps": 0.1,
    "model.tie_embeddings": (True, {"model.init_embeddings": "random"}),
    "model.init_embeddings": "random",
    "model.loss_chunk": 3,
    "data.path": "{folder}/other.txt",
    "data.val_path": "{folder}/other.txt",
    "data.sequence_length": 12,
    "data.val_fraction": 0.4,
    "data.cache_dir": "{folder}/elsewhere",
    "data.tokenizer": "bpe",
    "data.vocab_size": (260, {"data.tokenizer": "bpe"}),
    "data.token_type": ("uint16", {"data.path": "{folder}/tokens.bin", "data.val_path": "{folder}/tokens.bin"}),
    "data.packing": ("documents", {"data.path": "{folder}/short", "data.val_fraction": 0.2}),
}
# What needs more than a small run: where it is tested.
ELSEWHERE = {
    "health.memory_check": "unit/test_every_setting.py",
    "health.spikes": "unit/test_spikes.py",
    **dict.fromkeys(("log.wandb", "log.mlflow", "log.project"), "unit/test_trackers.py"),
    "train.deterministic": "unit/test_numerics.py",
    "data.workers": "unit/test_workers.py",
    "eval.choices": "unit/test_choices.py",
    "eval.chat": "unit/test_hf_task.py",
    "model.init_from": "e2e/test_generate_verb.py",
    "model.residual_dtype": "unit/test_decoder.py",
    "data.end_of_text": "unit/test_text.py",
    "data.dataset": "unit/test_vision.py",
    "data.root": "unit/test_vision.py",
    "data.download": "unit/test_vision.py",
    **dict.fromkeys(("model.path", "model.config", "model.attention"), "unit/test_hf_trainer.py"),
    **dict.fromkeys(
        ("model.lora_rank", "model.lora_alpha", "model.lora_dropout", "model.lora_targets"), "unit/test_lora.py"
    ),
    **dict.fromkeys(("dpo.beta", "dpo.label_smoothing"), "unit/test_preferences.py"),
    **dict.fromkeys(("model.resize_embeddings", "model.trust_remote_code"), "unit/test_embeddings.py"),
    **dict.fromkeys(
        (
            *("data.augment", "data.auto_augment", "data.cutmix", "data.flip", "data.image_size", "data.mixup"),
            *("data.num_classes", "data.random_erase", "data.synthetic", "data.synthetic_images", "data.val_resize"),
        ),
        "unit/test_image_data.py",
    ),
    **dict.fromkeys(("model.channels_last", "model.name", "model.zero_init_gamma"), "unit/test_image_models.py"),
    **dict.fromkeys(("labels.smoothing", "optim.patience"), "unit/test_large_batches.py"),
    "profile.ranks": "unit/test_timeline.py",
    "log.peak_tflops": "unit/test_utilization.py",
    **dict.fromkeys(
        (
            *("data.max_source_length", "data.max_target_length", "data.source_field", "data.source_prefix"),
            *("data.target_field", "eval.beams", "eval.bleu_tokenizer", "eval.samples"),
            *("data.source_language", "data.target_language"),
        ),
        "unit/test_seq2seq.py",
    ),
    **dict.fromkeys(
        ("data.audio_field", "data.lowercase", "data.max_seconds", "model.freeze_features", "model.spec_augment"),
        "unit/test_ctc.py",
    ),
    **dict.fromkeys(("data.text_field", "data.on_error", "data.show", "data.chat_template"), "unit/test_hf_task.py"),
}


# What is to change how or when something is done, and nothing of what is learned: in what a run may differ.
ONLY = {
    "model.checkpoint_blocks": {"types", "times"},
    "model.compile": {"compiled", "batches", "times"},  # the first pass is repeated where it turns out to draw numbers
    "log.every": {"metrics"},
    "log.grad_norms": {"metrics"},
    "log.tensorboard": {"files"},
    "checkpoint.every": {"files", "checks"},
    "checkpoint.keep_last": {"files"},
    "checkpoint.keep_every": {"files"},
    "health.stall_limit": {"plan"},
    "health.replica_check_every": {"checks", "said"},
    "health.noise_scale": {"said", "exchange"},
    "optim.shard": {"said"},  # on one rank; on several: unit/test_sharded.py
    "profile.timeline": {"files", "said"},
    "health.slow_rank": {"said"},
    "data.ahead": {"plan"},
    **{name: {"said", "exchange"} for name in ("comm.compression", "comm.bucket_mib", "comm.op")},
    **{name: {"said", "exchange"} for name in ("comm.compression_min_size", "comm.compression_warmup_steps")},
    "comm.compression_exact": {"said", "exchange"},
}


def cases(table):
    """Return each setting with one value, and what else is given."""
    for name, values in table.items():
        values = values if isinstance(values, tuple) else (values,)
        beside = values[-1] if isinstance(values[-1], dict) else {}
        yield from ((name, value, beside) for value in values if value is not beside)


def label(value):
    """Name a case in the list of tests by its setting and the value."""
    return "" if isinstance(value, dict) else str(value)


@pytest.fixture(scope="module")
def quick():
    """Save without waiting for the disk; one thread, so that runs are alike in the last bit."""
    before, threads = os.fsync, torch.get_num_threads()
    os.fsync = lambda file: None
    torch.set_num_threads(1)
    yield
    os.fsync = before
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def portraits(quick, tmp_path_factory):
    """Return a function that returns the portrait of a run with some settings, each of them once."""
    known = {}

    def of(given):
        key = repr(sorted(given.items()))
        if key not in known:
            known[key] = portrait(tmp_path_factory.mktemp("run") / "run", given)
        return known[key]

    return of


def test_every_setting_has_a_line_here():
    recipes = [*map(load_recipe, ("lm", "hf", "dpo", "mnist", "resnet", "seq2seq", "ctc")), small()]
    names = {name for recipe in recipes for name, _, _ in fields_of(recipe) if name != "seen"}
    names |= {f"optim.{name}" for kind in OPTIMIZERS for name, _, _ in fields_of(settings_class(kind)())}
    assert names == {*SHARED, *ONE_OF, *LM, *ELSEWHERE}
    assert all((Path(__file__).parents[1] / file).exists() for file in ELSEWHERE.values())


def test_two_runs_alike_have_the_same_portrait(quick, tmp_path):
    assert differences(portrait(tmp_path / "a", {}), portrait(tmp_path / "b", {})) == []


@pytest.mark.parametrize(("name", "value", "beside"), [*cases(SHARED)], ids=label)
def test_another_value_changes_something(portraits, name, value, beside):
    before, after = portraits(beside), portraits({**beside, name: value})
    assert not isinstance(before, str)
    assert differences(before, after)
    if isinstance(after, str):  # what ends a run is one of the effects
        assert name in ("train.max_time", "health.max_skipped_steps") or "tensorboard" in after


@pytest.mark.parametrize(("name", "value", "beside"), [case for case in cases(SHARED) if case[0] in ONLY], ids=label)
def test_what_is_no_matter_of_learning_changes_nothing_else(portraits, name, value, beside):
    before, after = portraits(beside), portraits({**beside, name: value})
    assert isinstance(after, str) or set(differences(before, after)) <= ONLY[name]


@pytest.mark.parametrize("name", ONE_OF)
def test_one_of_the_values_changes_something(portraits, name):
    after = [portraits({name: value}) for value in ONE_OF[name]]
    assert differences(*after)


def test_the_memory_check_can_be_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda job: (0, "are free"))
    job = job_of(tmp_path)
    with pytest.raises(ConfigError, match="no-memory-check"):
        checked_estimate(job)
    checked_estimate(with_setting(job, "health.memory_check", False))


@pytest.fixture(scope="module")
def texts(quick, tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for name, words in {"one": "some words of text, and more\n", "other": "quite other words\n"}.items():
        (folder / f"{name}.txt").write_text(words * 600)
    (folder / "short").mkdir()
    for number in range(40):
        (folder / "short" / f"{number}.txt").write_text(f"text {number}")
    np.arange(2000, dtype=np.uint32).tofile(folder / "tokens.bin")
    return folder


@pytest.mark.parametrize(("name", "value", "beside"), [*cases(LM)], ids=label)
def test_another_value_changes_the_language_model(texts, name, value, beside, tmp_path):
    def of(given):
        filled = {key: text.format(folder=texts) if isinstance(text, str) else text for key, text in given.items()}
        plain = {"data.path": f"{texts}/one.txt", "data.cache_dir": str(tmp_path / "cache"), "data.sequence_length": 24}
        small_model = {"model.num_layers": 2, "model.hidden_size": 32, "model.num_heads": 2}
        return task_portrait({**plain, **small_model, **filled}, [tmp_path / "cache", texts / "elsewhere"])

    before, after = of(beside), of({**beside, name: value})
    assert not isinstance(before, str), before
    assert not isinstance(after, str), after
    assert differences(before, after)
