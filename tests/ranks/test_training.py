"""Whole trainings: N ranks give what one process gives, on the real recipes."""

import dataclasses
import functools

import numpy as np
import pytest
import torch
from digits import write_digits
from test_optimizer import largest_difference
from test_world import digest

from hvdtrain.data.config import VisionConfig
from hvdtrain.errors import DivergedError
from hvdtrain.models.config import DecoderConfig
from hvdtrain.optim.sgd import SgdConfig
from hvdtrain.process.launch import Launch
from hvdtrain.recipes.lm import LanguageModel, StreamConfig
from hvdtrain.recipes.mnist import Digits
from hvdtrain.rundir.directory import RunDirectory
from hvdtrain.rundir.log import MetricLog
from hvdtrain.settings import (
    CheckpointConfig,
    CommConfig,
    EvalConfig,
    HealthConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from hvdtrain.trainer import fit, settle
from hvdtrain.world import SoloWorld

SOLO = SoloWorld(torch.device("cpu"), Launch("none"))
TOLERANCE = {"fp64": 1e-12, "fp32": 1e-5}


def quiet(_):
    pass


@pytest.fixture
def text(world, shared_dir):
    """A few files of real text: source code of the standard library."""
    if world.rank == 0:
        for module in (dataclasses, np.lib.format, pytest):
            name = module.__name__
            (shared_dir / f"{name}.txt").write_text(open(module.__file__, encoding="utf-8").read()[:9000])  # noqa: PTH123, SIM115
    world.barrier("text")
    return shared_dir


def language_model(text, *, tied=True, **train):
    return LanguageModel(
        train=TrainConfig(**{"steps": 20, "global_batch_size": 8, "precision": "fp64", **train}),
        optim=OptimConfig(peak_lr=1e-2, warmup_steps=3),
        model=DecoderConfig(num_layers=2, hidden_size=16, num_heads=2, num_kv_heads=1, tie_embeddings=tied),
        data=StreamConfig(path=str(text / "*.txt"), sequence_length=200, cache_dir=str(text / "cache")),
    )


@pytest.fixture
def images(world, shared_dir):
    if world.rank == 0:
        write_digits(shared_dir)
    world.barrier("images")
    return shared_dir


def digits(images, **train):
    return Digits(
        train=TrainConfig(**{"steps": 20, "global_batch_size": 16, "precision": "fp64", **train}),
        optim=SgdConfig(peak_lr=0.1, momentum=0.9, weight_decay=0.0),
        data=VisionConfig(root=str(images)),
    )


def trained(recipe, world, run_dir):
    """Train a recipe in this process; returns the model and the last evaluation."""
    job = settle(recipe.build(quiet), recipe, world, RunDirectory(run_dir), MetricLog(None, []))
    return job.task.model, fit(job)


def both(recipe, world, shared_dir, tmp_path):
    """Train on all ranks and on one; returns both models and evaluations."""
    model, metrics = trained(recipe, world, shared_dir / "run")
    alone = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, accum_steps=1))
    reference, expected = trained(alone, SOLO, tmp_path / "alone")
    assert len(set(world.all_gather_object(digest(model.state_dict().values()), "end"))) == 1
    return model, metrics, reference, expected


@pytest.mark.parametrize(
    ("tied", "accum_steps", "precision"),
    [(True, 1, "fp64"), (False, 2, "fp64"), pytest.param(True, 2, "fp32", marks=pytest.mark.ranks(2))],
)
def test_lm_equals_one_process(world, text, tmp_path, tied, accum_steps, precision):
    """Clipping bites (norm 0.5), and the epochs end in short batches with a short last window."""
    recipe = language_model(text, tied=tied, accum_steps=accum_steps, precision=precision, max_grad_norm=0.5)
    model, metrics, reference, expected = both(recipe, world, text, tmp_path)
    assert largest_difference(model, reference) < TOLERANCE[precision]
    assert metrics == pytest.approx(expected, abs=10 * TOLERANCE[precision])
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


@pytest.mark.parametrize(
    ("accum_steps", "precision"), [(2, "fp64"), pytest.param(1, "fp32", marks=pytest.mark.ranks(2))]
)
def test_mnist_equals_one_process(world, images, tmp_path, accum_steps, precision):
    """150 images in batches of 16 end in a batch of 6: with 4 ranks and accumulation some have less than others."""
    recipe = digits(images, accum_steps=accum_steps, precision=precision, max_grad_norm=1.0)
    model, metrics, reference, expected = both(recipe, world, images, tmp_path)
    assert largest_difference(model, reference) < TOLERANCE[precision]
    assert metrics["val/accuracy"] * 37 == pytest.approx(round(expected["val/accuracy"] * 37))
    assert metrics == pytest.approx(expected, abs=10 * TOLERANCE[precision])


@pytest.mark.ranks(2)
@pytest.mark.same_on_gloo
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_autocast_keeps_ranks_equal(world, text, precision):
    model, metrics = trained(language_model(text, precision=precision, steps=5), world, text / "run")
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert np.isfinite(metrics["val/loss"])
    assert len(set(world.all_gather_object(digest(model.parameters()), "end"))) == 1


@pytest.mark.ranks(2, 4)
def test_resuming_is_bitwise_the_same(world, text):
    """Stop after 7 of 12 steps (in mid-epoch), go on in a new process state, and compare every bit."""
    settings = {"steps": 12, "precision": "fp32", "accum_steps": 2}
    whole, metrics = trained(language_model(text, **settings), world, text / "whole")
    halfway = dataclasses.replace(language_model(text, **settings), checkpoint=CheckpointConfig(every=7))
    job = settle(halfway.build(quiet), halfway, world, RunDirectory(text / "halves"), MetricLog(None, []))
    with pytest.raises(StoppedError):
        fit(dataclasses.replace(job, log=StopAt(8)))
    torch.manual_seed(world.rank)  # whatever the random state was, it must not matter
    resumed, again = trained(halfway, world, text / "halves")
    assert digest(resumed.state_dict().values()) == digest(whole.state_dict().values())
    assert again == metrics


class StoppedError(Exception):
    pass


class StopAt(MetricLog):
    """A log that ends the run at its first line after some step."""

    def __init__(self, step):
        super().__init__(None, [])
        self.step = step

    def write(self, step, metrics, event=None):
        if step >= self.step:
            raise StoppedError


@pytest.mark.ranks(2, 4)
@pytest.mark.same_on_gloo
def test_evaluation_with_fewer_samples_than_ranks(world, images, tmp_path):
    if world.rank == 0:
        write_digits(images / "tiny", num_test=1)
    world.barrier("tiny")
    recipe = dataclasses.replace(digits(images / "tiny", steps=1), eval=EvalConfig(batch_size=7))
    _, metrics, _, expected = both(recipe, world, images, tmp_path)
    assert metrics == pytest.approx(expected, abs=1e-12)


class Network(torch.nn.Module):
    """Blocks with batch normalisation and dropout on 28x28 images."""

    def __init__(self, norm, dropout):
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Conv2d(1, 4, 5, stride=3)
        self.blocks = torch.nn.ModuleList(
            torch.nn.Sequential(
                torch.nn.Conv2d(4, 4, 3, padding=1),
                torch.nn.BatchNorm2d(4) if norm else torch.nn.Identity(),
                torch.nn.ReLU(),
                torch.nn.Dropout(dropout),
            )
            for _ in range(2)
        )
        self.last = torch.nn.Linear(256, 10)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return torch.nn.functional.log_softmax(self.last(x.flatten(1)), 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pictures(Digits):
    norm: bool = True
    dropout: float = 0.0

    def build(self, say):
        return dataclasses.replace(super().build(say), model=Network(self.norm, self.dropout))


def pictures(images, model=None, norm=True, dropout=0.0, optim=None, comm=None, **train):
    return Pictures(
        train=TrainConfig(**{"steps": 12, "global_batch_size": 16, "precision": "fp64", **train}),
        optim=optim or OptimConfig(peak_lr=0.01, weight_decay=0.1),
        comm=comm or CommConfig(),
        model=model or ModelConfig(),
        data=VisionConfig(root=str(images)),
        norm=norm,
        dropout=dropout,
    )


def test_synchronised_batch_norm_equals_one_process(world, images, tmp_path):
    """150 images in batches of 16 end in one of 6, where ranks have 1 or 2 images."""
    recipe = pictures(images, model=ModelConfig(sync_batch_norm=True))
    model, metrics, reference, expected = both(recipe, world, images, tmp_path)
    assert largest_difference(model, reference) < 1e-9
    ours, theirs = dict(model.named_buffers()), dict(reference.named_buffers())
    assert max((ours[name] - theirs[name]).abs().max().item() for name in ours) < 1e-9
    assert metrics == pytest.approx(expected, abs=1e-8)


@pytest.mark.ranks(4)
def test_synchronised_batch_norm_with_a_rank_without_images(world, images):
    """150 images in batches of 148 leave 2 for 4 ranks."""
    recipe = pictures(images, model=ModelConfig(sync_batch_norm=True), global_batch_size=148, steps=4)
    model, metrics = trained(recipe, world, images / "run")
    assert np.isfinite(metrics["val/loss"])
    assert len(set(world.all_gather_object(digest(model.state_dict().values()), "end"))) == 1


@pytest.mark.ranks(1)
def test_synchronised_batch_norm_is_torchs_on_one_rank(images, tmp_path):
    ours, _ = trained(pictures(images, model=ModelConfig(sync_batch_norm=True), steps=4), SOLO, tmp_path / "ours")
    plain, _ = trained(pictures(images, steps=4), SOLO, tmp_path / "plain")
    pairs = zip(ours.state_dict().values(), plain.state_dict().values(), strict=True)
    assert max((a - b).abs().max().item() for a, b in pairs) < 1e-9


@pytest.mark.ranks(2)
@pytest.mark.same_on_gloo
def test_batch_norm_statistics_are_averaged(world, images):
    """Each rank normalises by its own samples; the statistics of evaluation are those of all."""
    model, _ = trained(pictures(images, steps=5), world, images / "run")
    assert len(set(world.all_gather_object(digest(model.state_dict().values()), "end"))) == 1
    assert model.blocks[0][1].num_batches_tracked == 5


@pytest.mark.ranks(2)
@pytest.mark.same_on_gloo
@pytest.mark.parametrize(
    ("what", "dropout"),
    [
        ("compile", 0.3),
        ("compile_blocks", 0.0),
        ("checkpoint_blocks", 0.3),
        ("muon", 0.0),
        ("NAdam", 0.3),
        ("linear rule", 0.0),
    ],
)
def test_other_ways_equal_one_process(world, images, tmp_path, what, dropout, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(torch.nn.Module.compile, backend="eager"))
    model = {
        "compile": ModelConfig(compile="model"),
        "compile_blocks": ModelConfig(compile="blocks"),
        "checkpoint_blocks": ModelConfig(checkpoint_blocks=True),
    }.get(what)
    optim = {
        "muon": OptimConfig(name="muon", peak_lr=0.01),
        "NAdam": OptimConfig(name="NAdam", peak_lr=0.01),
        "linear rule": OptimConfig(peak_lr=0.005, lr_rule="linear", reference_batch=8),
    }.get(what)
    recipe = pictures(images, model=model, optim=optim, norm=False, dropout=dropout, steps=5, accum_steps=2)
    model, _, reference, _ = both(recipe, world, images, tmp_path)
    assert largest_difference(model, reference) < 1e-11


@pytest.mark.ranks(1)
def test_linear_rule_is_the_scaled_rate(images, tmp_path):
    scaled = OptimConfig(peak_lr=0.005, lr_rule="linear", reference_batch=8)
    ours, _ = trained(pictures(images, optim=scaled, steps=3), SOLO, tmp_path / "scaled")
    plain, _ = trained(pictures(images, optim=OptimConfig(peak_lr=0.01), steps=3), SOLO, tmp_path / "plain")
    assert digest(ours.parameters()) == digest(plain.parameters())


@pytest.mark.ranks(2)
def test_bfloat16_weights(world, text):
    model, metrics = trained(language_model(text, precision="bf16-true", steps=5), world, text / "run")
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert np.isfinite(metrics["val/loss"])
    assert len(set(world.all_gather_object(digest(model.parameters()), "end"))) == 1


@pytest.mark.ranks(1, 2)
@pytest.mark.same_on_gloo
def test_a_rank_that_drifts_is_named_before_the_next_save(world, text):
    recipe = dataclasses.replace(
        language_model(text, steps=9), health=HealthConfig(replica_check_every=5), checkpoint=CheckpointConfig(every=3)
    )
    job = settle(recipe.build(quiet), recipe, world, RunDirectory(text / "run"), MetricLog(None, []))

    class Bug(MetricLog):
        def write(self, step, metrics, event=None):
            if step == 4 and world.rank == world.size - 1:
                next(iter(job.task.model.parameters())).data[0, 0] += 1e-9

    job = dataclasses.replace(job, log=Bug(None, []), config=dataclasses.replace(recipe, log=LogConfig(every=1)))
    if world.size == 1:
        fit(job)
        return
    with pytest.raises(DivergedError, match=rf"model.embed_tokens.weight on rank {world.size - 1} differs"):
        fit(job)
    world.barrier("saved")  # rank 0 may still be writing
    saved = sorted(path.name for path in (text / "run" / "checkpoints").glob("step-*"))
    assert saved == ["step-00000003"]


@pytest.mark.ranks(2)
def test_a_callback_of_one_rank_ends_all(world, images, tmp_path):
    """All end at the same step, save, and know the reason when the run is started again."""

    class Enough:
        def after_step(self, run):
            if run.step == 3 and run.world.rank == run.world.size - 1:
                run.stop("the last rank has enough")

    said = []
    recipe = digits(images, micro_batch_size=4)
    task = dataclasses.replace(recipe.build(quiet), callbacks=[Enough()])
    for _ in range(2):
        log = MetricLog(None, [])
        log.say = said.append
        job = settle(task, recipe, world, RunDirectory(images / "ended"), log)
        fit(job)
    assert "ended at step 3 of 20: the last rank has enough" in said
    assert "this run has finished before, at step 3: the last rank has enough" in said
    assert len(set(world.all_gather_object(digest(task.model.state_dict().values()), "ended"))) == 1
