"""Formats and local updates with every kind of parameter, by a loss that is linear in all of them.

Gradients then do not depend on the weights, and what each way to average must come to is known to the last digits.
"""

import copy
import dataclasses
import itertools

import pytest
import torch
from thread_world import run_ranks
from torch import nn
from torch.nn import functional

from hvdtrain.data.dataset import TensorSamples
from hvdtrain.optim.sgd import SgdConfig
from hvdtrain.rundir.directory import RunDirectory
from hvdtrain.rundir.log import MetricLog
from hvdtrain.settings import CommConfig, Config, TrainConfig
from hvdtrain.trainer import Task, settle, train_step
from hvdtrain.trainer.outer_updates import OuterUpdates
from hvdtrain.trainer.saver import Saver
from hvdtrain.trainer.state import start_training
from hvdtrain.trainer.unfreezing import GradualUnfreezing
from hvdtrain.world.filling import like

STEPS, LR, TOKENS = 6, 0.1, 40
FORMATS = ("none", "fp16", "bf16", "int8", "powersgd:1", "topk:0.1")
EXACT = ("none", "fp16", "bf16")


class Zoo(nn.Module):
    """A parameter of each kind; `late` learns from the third step on, where the task has it so."""

    def __init__(self, sparse=False, is_complex=False):
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(TOKENS, 8, sparse=sparse)
        self.head = nn.Linear(8, TOKENS, bias=False)
        self.head.weight = self.words.weight if not sparse else self.head.weight
        self.scalar = nn.Parameter(torch.tensor(0.5))
        self.none = nn.Parameter(torch.zeros(0, 3))
        spectrum = torch.randn(6, 5, dtype=torch.complex64)
        self.spectrum = nn.Parameter(spectrum if is_complex else torch.view_as_real(spectrum).contiguous())
        self.kernel = nn.Parameter(torch.randn(4, 3, 5, 5).contiguous(memory_format=torch.channels_last))
        self.large = nn.Parameter(torch.randn(150, 1000) * 0.1)  # more than a bucket of 1 MiB
        self.late = nn.Linear(8, 3)
        self.frozen = nn.Linear(8, 5).requires_grad_(False)
        self.unused = nn.Linear(8, 2)
        self.at_times = nn.Linear(8, 2)
        """Used by the samples of some ranks, in some steps."""

    def forward(self, tokens, x):
        """Return a number for each sample, linear in each parameter that learns."""
        columns = x.mean(1)
        found = functional.embedding(tokens, self.words.weight, sparse=self.words.sparse).sum((1, 2)) * columns
        found = found + self.head(x).sum(1) + self.scalar * columns + self.none.sum()
        real = torch.view_as_real(self.spectrum) if self.spectrum.is_complex() else self.spectrum
        found = found + (real * torch.linspace(-1, 2, real.numel()).view(real.shape)).sum() * columns
        image = columns.view(-1, 1, 1, 1) * torch.linspace(-1, 1, 75).view(3, 5, 5).to(columns.dtype)
        found = found + functional.conv2d(image, self.kernel).flatten(1) @ torch.arange(4.0).to(columns.dtype)
        found = found + (self.large @ torch.linspace(-1, 1, 1000).to(columns.dtype)).sum() * columns
        found = found + self.late(x).sum(1) + self.frozen(x).sum(1)
        if bool(x[0, 0] > 0):
            found = found + self.at_times(x).sum(1)
        return found


# Ranks are threads: drawing numbers there would be a race.
MODELS = {kind: Zoo(*kind) for kind in itertools.product((False, True), (False, True))}


def losses(model, batch):
    return {"loss": model(*batch[:2]).sum()}


def job_of(world, folder, *, sparse=False, unfreezes=False, precision="fp64", **comm):
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(TOKENS, (48, 4), generator=generator)
    x = torch.randn(48, 8, generator=generator)
    data = TensorSamples(tokens, x)
    config = Config(
        train=TrainConfig(steps=STEPS, global_batch_size=12, precision=precision, max_grad_norm=None),
        optim=SgdConfig(peak_lr=LR, weight_decay=0.0, schedule="constant"),
        comm=CommConfig(**{"compression_min_size": 1, "bucket_mib": 1, **comm}),
    )
    callbacks = [GradualUnfreezing({"late": 2})] if unfreezes else []
    is_complex = precision != "fp64"  # checkpoints hold no complex128
    model = copy.deepcopy(MODELS[sparse, is_complex])
    task = Task(model=model, train_data=data, val_data=data, loss_sums=losses, callbacks=callbacks)
    return settle(task, config, world, RunDirectory(folder), MetricLog(None, []))


def trained(job, steps=STEPS):
    training = start_training(job)
    while training.step < steps:
        train_step(job, training)
    return training


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def left_over(training):
    outer = training.component(OuterUpdates)
    if outer is not None:
        return {name: kept.clone() for codec in outer.codecs for name, kept in codec.left_over().items()}
    named = dict(training.model.named_parameters())  # gradients travel as their parameters lie in memory
    return {name: like(kept.reshape(-1), named[name]) for name, kept in training.optimizer.codec.left_over().items()}


def check_alike(ranks):
    for other in ranks[1:]:
        assert all(torch.equal(tensor, other[name]) for name, tensor in ranks[0].items())


def check_nothing_is_lost(exact, ranks, left, factor):
    """What the weights differ by is what all ranks still have to send."""
    assert any(kept.any() for kept in left[0].values())
    for name, tensor in exact.items():
        owed = sum(kept[name] for kept in left) if name in left[0] else torch.zeros(())
        gap = (ranks[0][name] - tensor - factor * owed).abs()
        assert gap.numel() == 0 or gap.max() < 1e-9, name


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("size", [2, 3])
def test_every_format_carries_every_kind(tmp_path, size, sparse):
    """Averaged in every step, as local updates after each period, and in fragments."""

    def work(world):
        found = {}
        for compression, sync in itertools.product(FORMATS, ("every-step", "local")):
            comm = {"compression": compression, "sync": sync, "period": 3 if sync == "local" else 50}
            training = trained(job_of(world, tmp_path, sparse=sparse, unfreezes=True, **comm))
            gone = {name for name, own in training.model.named_parameters() if own.grad is None}
            found[compression, sync] = weights(training.model), left_over(training), gone
        return found

    ranks = run_ranks(size, work)
    exact = ranks[0]["none", "every-step"][0]
    begun = {name: tensor.double() for name, tensor in MODELS[sparse, False].named_parameters()}
    still = {name for name, tensor in begun.items() if torch.equal(exact[name], tensor)}
    assert still == {f"{name}.{part}" for name in ("frozen", "unused") for part in ("weight", "bias")} | {"none"}
    for (compression, sync), (_, _, gone) in ranks[0].items():
        found = [rank[compression, sync] for rank in ranks]
        check_alike([own for own, *_ in found])
        assert {name.partition(".")[0] for name in gone} >= {"frozen", "unused"}
        if compression not in EXACT:
            factor = LR if sync == "every-step" else -1.0  # gradients are subtracted, updates added
            check_nothing_is_lost(exact, [own for own, *_ in found], [left for _, left, _ in found], factor)
        else:
            for name, own in found[0][0].items():
                off = (own - exact[name]).abs().max().item() if own.numel() else 0.0
                assert off < (1e-9 if compression == "none" else 0.5), (compression, sync, name, off)


@pytest.mark.parametrize("precision", ["fp32", "bf16-true"])
def test_ranks_stay_equal_in_narrow_types(tmp_path, precision):
    def work(world):
        found = {}
        for compression, sync in itertools.product(FORMATS, ("every-step", "local")):
            comm = {"compression": compression, "sync": sync, "period": 3 if sync == "local" else 50}
            found[compression, sync] = weights(trained(job_of(world, tmp_path, precision=precision, **comm)).model)
        return found

    ranks = run_ranks(2, work)
    for way, own in ranks[0].items():
        check_alike([rank[way] for rank in ranks])
        assert all(tensor.isfinite().all() for tensor in own.values()), way


def test_what_is_frozen_neither_travels_nor_is_kept(tmp_path):
    """An adapter's base may be a thousand times as large; it is sent when it begins to learn, and not before."""
    learning = sum(own.numel() for own in Zoo().parameters() if own.requires_grad)
    late = sum(own.numel() for own in Zoo().late.parameters())

    def work(world, unfreezes):
        job = job_of(world, tmp_path, sync="local", period=2, unfreezes=unfreezes)
        training, sent = start_training(job), []
        for _ in range(4):
            before = world.handed_bytes["outer"]
            train_step(job, training)
            sent.append((world.handed_bytes["outer"] - before) // 8)
        outer = training.component(OuterUpdates).state_dict()["last"]
        return sent, sum(tensor.numel() for name, tensor in outer.items() if name.startswith("frozen"))

    assert run_ranks(2, lambda world: work(world, False))[0] == ([0, learning, 0, learning], 0)
    assert run_ranks(2, lambda world: work(world, True))[0] == ([0, learning - late, 0, learning], 0)


@pytest.mark.parametrize("compression", ["none", "int8"])
def test_a_run_in_which_layers_begin_to_learn_goes_on_bitwise(tmp_path, compression):
    """Fragments keep their parameters, whichever learn when the run is started again."""
    comm = {"sync": "local", "period": 3, "fragments": 2, "overlap_steps": 1, "compression": compression}
    comm |= {"outer": "nesterov", "unfreezes": True}

    def cut(step):
        def work(world):
            folder = tmp_path / f"cut-{step}"
            job = job_of(world, folder, **comm)
            with Saver(job) as saver:
                saver.save(trained(job, step), {})
                saver.finish()
            return weights(trained(job_of(world, folder, **comm)).model)

        return work

    whole = run_ranks(2, lambda world: weights(trained(job_of(world, tmp_path / "whole", **comm)).model))
    for step in range(1, STEPS):
        for one, other in zip(whole, run_ranks(2, cut(step)), strict=True):
            check_alike([one, other])


@pytest.mark.parametrize("size", [2, 3])
def test_sharded_state_moves_every_kind_as_it_is_moved_undivided(tmp_path, size):
    def work(world):
        job = job_of(world, tmp_path, unfreezes=True)
        config = dataclasses.replace(job.config, optim=dataclasses.replace(job.config.optim, shard=True, momentum=0.9))
        whole = dataclasses.replace(config, optim=dataclasses.replace(config.optim, shard=False))
        jobs = []
        for own in (config, whole):
            task = dataclasses.replace(job_of(world, tmp_path).task, callbacks=job.task.callbacks)
            jobs.append(settle(task, own, world, job.run, job.log))
        return [weights(trained(own).model) for own in jobs]

    for sharded, whole in run_ranks(size, work):
        gaps = {name: (own - whole[name]).abs().max().item() for name, own in sharded.items() if own.numel()}
        assert max(gaps.values()) < 1e-12, gaps
