"""Settings that do nothing where they are given: said in one line, and nothing else changes by them."""

import dataclasses
import os
import typing

import pytest
import torch
from test_components import SOLO, job_of
from thread_world import run_ranks

from hvdtrain.data.dataset import TensorSamples
from hvdtrain.errors import ConfigError
from hvdtrain.process.launch import Launch
from hvdtrain.recipes.given import apply
from hvdtrain.settings import CheckpointConfig, CommConfig, DataConfig, OptimConfig
from hvdtrain.settings.fields import fields_of
from hvdtrain.settings.values import Source
from hvdtrain.trainer import Recipe, train_step
from hvdtrain.trainer.outer_updates import OuterUpdates
from hvdtrain.trainer.state import start_training
from hvdtrain.trainer.without_effect import without_effect
from hvdtrain.world import SoloWorld

OTHERS = {int: 7, float: 0.25, bool: True, type(None): 5, str: "*weight"}


def of_several_ranks():
    return [name for name, item, _ in fields_of(Recipe()) if item.metadata.get("several_ranks")]


def other_value(name):
    """Return a value that the setting may have, and has not by default."""
    section, _, field = name.partition(".")
    settings = getattr(Recipe(), section)
    default, kind = getattr(settings, field), typing.get_type_hints(type(settings))[field]
    kind = next((part for part in typing.get_args(kind) if typing.get_origin(part) is typing.Literal), kind)
    if typing.get_origin(kind) is typing.Literal:
        return next(value for value in reversed(typing.get_args(kind)) if value != default and ":" not in value)
    limits = next(item.metadata["limits"] for path, item, _ in fields_of(Recipe()) if path == name)
    if default is None and "below" in limits:
        return OTHERS[float]
    return 1 + OTHERS[float] if limits.get("above", 0) >= 1 else OTHERS[type(default)]


def with_setting(job, name, value):
    section, _, field = name.partition(".")
    changed = dataclasses.replace(getattr(job.config, section), **{field: value})
    return dataclasses.replace(job, config=dataclasses.replace(job.config, **{section: changed}))


def weights(job):
    training = start_training(job)
    for _ in range(2):
        train_step(job, training)
    return [tensor.clone() for tensor in training.model.state_dict().values()]


@pytest.mark.parametrize("name", of_several_ranks())
def test_on_one_rank_it_is_said_and_changes_nothing(tmp_path, name):
    plain = job_of(tmp_path, precision="fp64")
    job = with_setting(plain, name, other_value(name))
    (line,) = without_effect(job)
    assert f"--{name.replace('_', '-')}" in line
    assert line.startswith("one rank:")
    # Synchronised batch normalisation is another formula, with other last bits.
    torch.testing.assert_close(weights(job), weights(job_of(tmp_path, precision="fp64")), rtol=1e-5, atol=1e-6)
    assert without_effect(plain) == []


def test_on_several_ranks_nothing_is_said(tmp_path):
    job = with_setting(job_of(tmp_path), "comm.compression", "fp16")
    assert run_ranks(2, lambda world: without_effect(dataclasses.replace(job, world=world))) == [[], []]
    assert job.world is SOLO


@pytest.mark.parametrize(
    ("optim", "limit", "says"),
    [
        ({"name": "adamw"}, 2.5, ["clipped to a norm of 2.5", "little effect with adamw"]),
        ({"name": "Adadelta"}, None, ["little effect with Adadelta"]),
        ({"name": "sgd"}, 1.0, ["clipped to a norm of 1:"]),
        ({"name": "sgd"}, None, []),
    ],
)
def test_what_adasum_and_others_do_to_each_other_is_said(tmp_path, optim, limit, says):
    job = with_setting(with_setting(job_of(tmp_path), "comm.op", "adasum"), "train.max_grad_norm", limit)
    job = dataclasses.replace(job, config=dataclasses.replace(job.config, optim=OptimConfig(peak_lr=0.05, **optim)))
    for lines in run_ranks(2, lambda world: without_effect(dataclasses.replace(job, world=world))):
        assert len(lines) == len(says)
        assert all(part in line and line.startswith("adasum:") for part, line in zip(says, lines, strict=True))


@pytest.mark.parametrize(
    ("comm", "says"),
    [
        ({"period": 1}, "averaged after every step, not gradients (outer learning rate 1)"),
        ({"period": 8, "fragments": 2, "overlap_steps": 1}, "every 8 steps in 2 fragments, taken 1 step later"),
        ({"period": 8, "overlap_steps": 4}, "averaged every 8 steps, taken 4 steps later, own weights x 0.5"),
        ({"period": 4, "sync_warmup_steps": 1}, "averaged every 4 steps, and after the first step, not gradients"),
        ({"period": 4, "sync_warmup_steps": 9}, "averaged every 4 steps, and after each of the first 9 steps"),
        ({"compression": "int8", "compression_min_size": 1, "compression_warmup_steps": 2}, "from average 3 on: "),
        ({"compression": "int8", "compression_min_size": 1}, " in each average"),
    ],
)
def test_the_start_says_how_updates_are_averaged(tmp_path, comm, says):
    """In numbers that fit their nouns; what travels, travels with an average, not in each step."""
    plain = job_of(tmp_path)
    config = dataclasses.replace(plain.config, comm=CommConfig(sync="local", **comm))
    job = dataclasses.replace(plain, config=config, task=dataclasses.replace(plain.task, model=torch.nn.Linear(64, 8)))
    for about in run_ranks(2, lambda world: OuterUpdates(dataclasses.replace(job, world=world)).about):
        assert says in about
        assert about.startswith("updates:    averaged ")


def test_reading_ahead_of_data_that_is_not_read_by_threads(tmp_path):
    class Own(TensorSamples):
        def batch(self, indices):
            return super().batch(indices)

    job = with_setting(job_of(tmp_path), "data.ahead", 4)
    assert without_effect(job) == []
    task = dataclasses.replace(job.task, train_data=Own(*job.task.train_data.tensors))
    (line,) = without_effect(dataclasses.replace(job, task=task))
    assert "--data.ahead: Own is not read by threads; give --data.workers" in line
    config = dataclasses.replace(job.config, data=DataConfig(ahead=4, workers=1))
    assert without_effect(dataclasses.replace(job, task=task, config=config)) == []


def test_workers_that_a_stream_does_not_have(tmp_path):
    job = with_setting(job_of(tmp_path), "data.workers", 2)
    assert without_effect(job) == []
    task = dataclasses.replace(job.task, train_data=(pair for pair in [(torch.ones(1), torch.ones(1))]))
    (line,) = without_effect(dataclasses.replace(job, task=task))
    assert "no effect of --data.workers: a stream is read by each rank itself" in line


def test_workers_that_are_more_than_there_are_cores(tmp_path):
    cores = len(os.sched_getaffinity(0))
    (line,) = without_effect(with_setting(job_of(tmp_path), "data.workers", max(3, cores + 1)))
    assert line.startswith(f"reading:    {max(3, cores + 1)} --data.workers are more than this rank's share")
    assert without_effect(with_setting(job_of(tmp_path), "data.workers", max(1, cores))) == []


@pytest.mark.parametrize(("every", "keep", "is_said"), [(4, 8, False), (4, 6, False), (5, 7, True), (None, 5, True)])
def test_checkpoints_that_are_never_kept(tmp_path, every, keep, is_said):
    job = job_of(tmp_path)  # 12 steps
    evaluations = dataclasses.replace(job.config.eval, every=None)
    checkpoint = CheckpointConfig(every=every, keep_every=keep)
    config = dataclasses.replace(job.config, checkpoint=checkpoint, eval=evaluations)
    assert len(without_effect(dataclasses.replace(job, config=config))) == is_said


def test_buckets_that_adasum_does_not_have_are_refused():
    with pytest.raises(ConfigError, match=r"--comm\.bucket-mib has no effect|bucket_mib has no effect"):
        apply(Recipe(), [({"comm": {"op": "adasum", "bucket_mib": 3}}, Source("train()"))])


@pytest.mark.parametrize(
    ("precision", "says"),
    [
        ("fp32", ""),
        ("fp16", ""),
        ("bf16", "bf16 is slow on a Tesla V100-SXM2-16GB"),
        ("bf16-true", "bf16-true is slow"),
        ("tf32", "no effect of --train.precision tf32"),
    ],
)
@pytest.mark.parametrize("is_old", [True, False])
def test_what_a_card_before_the_a100_lacks(tmp_path, monkeypatch, precision, says, is_old):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not is_old or including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100-SXM2-16GB")
    world = SoloWorld(torch.device("cuda", 0), Launch("none"))
    job = dataclasses.replace(with_setting(job_of(tmp_path), "train.precision", precision), world=world)
    lines = without_effect(job)
    assert len(lines) == bool(says and is_old)
    assert all(says in line and line.startswith("precision:") for line in lines)
