"""Data that is not the same: on two ranks, or in two starts of a run; and training on users' data, resumed exactly."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from thread_world import run_ranks
from torch import nn
from users_data import Endless, Vectors

import hvdtrain
from hvdtrain import Task, TensorSamples
from hvdtrain.data.fingerprint import explain_change, explain_ranks, fingerprint_of
from hvdtrain.data.samplers import InOrder, Weighted
from hvdtrain.data.users import as_dataset
from hvdtrain.errors import ConfigError, DataError, ResumeError
from hvdtrain.process.launch import Launch
from hvdtrain.rundir.directory import RunDirectory
from hvdtrain.rundir.log import MetricLog
from hvdtrain.settings import CheckpointConfig, Config, DataConfig, LogConfig, OptimConfig, TrainConfig
from hvdtrain.trainer import fit, settle
from hvdtrain.trainer.same_data import compare_data
from hvdtrain.world import SoloWorld

SOLO = SoloWorld(torch.device("cpu"), Launch("none"))


def prints(*sets):
    return [{"training": fingerprint_of(as_dataset(data))} for data in sets]


def test_ranks_with_the_same_data_are_not_bothered():
    assert explain_ranks(prints(Vectors(), Vectors(), Vectors())) is None
    assert explain_ranks(prints(Endless(), Endless())) is None


@pytest.mark.parametrize(
    ("sets", "says"),
    [
        ((Vectors(30), Vectors(29)), "the training data .* rank 1 has 29 samples, and the others 30"),
        ((Vectors(30), Vectors(29), Vectors(29)), "rank 0 has 30 samples, and the others 29"),
        ((Vectors(seed=0), Vectors(seed=1), Vectors(seed=0)), "rank 1 has other samples than the others.*fixed seed"),
        ((Vectors(seed=0), Vectors(seed=1), Vectors(seed=2), Vectors(seed=0)), "rank 1, 2 have other samples"),
    ],
)
def test_ranks_with_other_data_are_named(sets, says):
    assert re.search(says, explain_ranks(prints(*sets)))


def test_a_part_that_some_ranks_lack_is_named():
    (one,) = prints(Vectors(3))
    two = {**one, "held-out": one["training"]}
    assert "rank 1 has 0 samples, and the others 3" in explain_ranks([two, one, two])


def test_changes_between_starts():
    (then,), (grown,), (other,) = prints(Vectors(30)), prints(Vectors(31)), prints(Vectors(30, seed=1))
    assert explain_change(then, then) is None
    assert explain_change(then, grown) == "the training data had 30 samples and has 31 now"
    assert explain_change(then, other) == "the training data is not the same: other samples"
    assert explain_change({}, then) is None  # saved by a version that did not look


def loss(model, batch):
    x, y = batch
    return {"loss": F.mse_loss(model(x), y, reduction="sum")}


def train(folder, data, steps, *, val_data=None, workers=0, allowed=(), **more):
    torch.manual_seed(0)
    made = Task(
        model=nn.Linear(4, 1), train_data=data, val_data=val_data or Vectors(10, seed=9), loss_sums=loss, **more
    )
    config = Config(
        train=TrainConfig(steps=steps, global_batch_size=8, micro_batch_size=4),
        optim=OptimConfig(schedule="constant"),
        log=LogConfig(every=1),
        checkpoint=CheckpointConfig(every=1),
        data=DataConfig(workers=workers),
    )
    job = settle(made, config, SOLO, RunDirectory(folder), MetricLog(None, []), allowed)
    folder.mkdir(exist_ok=True)
    fit(job)
    return made.model.weight.detach().clone(), made.train_data


class EveryThird:
    """An order of one's own."""

    def samples(self, positions, num_samples, seed, epoch):
        return positions * 3 % num_samples


CASES = {
    "samples": (Vectors, {}),
    "workers": (Vectors, {"workers": 2}),
    "in order": (Vectors, {"sampler": InOrder()}),
    "weighted": (Vectors, {"sampler": Weighted(np.arange(30.0))}),
    "own order": (lambda: Vectors(31), {"sampler": EveryThird()}),
    "full batches": (Vectors, {"drop_last": True}),
    "stream": (lambda: Endless(vectors=True), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_run_is_bitwise_the_same(name, tmp_path):
    """6 steps of 8, over the end of an epoch of 30 samples; the samples draw at random."""
    make, more = CASES[name][0], dict(CASES[name][1])
    workers = {"workers": more.pop("workers", 0)}
    whole, _ = train(tmp_path / "whole", make(), 6, **more)
    train(tmp_path / "parts", make(), 3, **more)
    parts, data = train(tmp_path / "parts", make(), 6, **more, **workers)
    assert torch.equal(whole, parts)
    if name == "stream":
        assert data.stream.yielded == 24
    elif more:
        assert not torch.equal(whole, train(tmp_path / "plain", make(), 6)[0])


def test_data_that_grew_is_noticed_when_a_run_goes_on(tmp_path):
    train(tmp_path, Vectors(30), 2)
    for data in (Vectors(38), Vectors(30, seed=1)):
        with pytest.raises(ResumeError, match=r"the training data .*\(data\).* choose another --run-dir"):
            train(tmp_path, data, 4)
    with pytest.raises(ResumeError, match="the held-out data had 10 samples and has 11 now"):
        train(tmp_path, Vectors(30), 4, val_data=Vectors(11, seed=9))
    train(tmp_path, Vectors(38), 4, allowed=("data",))


@pytest.mark.parametrize(
    ("more", "error", "says"),
    [
        ({"data": Vectors(), "sampler": Weighted([1.0, 2.0])}, DataError, "2 weights for 30 samples"),
        ({"data": Endless(vectors=True), "sampler": Weighted([1.0])}, DataError, "a stream has its own order"),
        ({"data": Vectors(), "val_data": Endless()}, DataError, "held-out stream must say"),
        ({"data": Endless(vectors=True), "steps": None}, ConfigError, "train.steps"),
    ],
)
def test_what_does_not_fit_together_is_refused(more, error, says, tmp_path):
    with pytest.raises(error, match=says):
        train(tmp_path, more.pop("data"), more.pop("steps", 2), **more)


def test_weights_must_be_weights():
    for wrong in ([-1.0, 2.0], [0.0, 0.0], [float("nan"), 1.0], [[1.0]]):
        with pytest.raises(DataError, match="weight"):
            Weighted(wrong)


def test_processes_of_training_and_evaluation_end(tmp_path):
    before = children()
    train(tmp_path, Vectors(), 2, workers=1, val_data=Vectors(10, seed=9))
    assert children() == before


def children():
    return Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text()


@pytest.mark.parametrize(
    ("train_rows", "val_rows", "says"),
    [
        ((30, 30), (10, 10), None),
        ((30, 29), (10, 10), "the training data is not the same on all ranks: rank 1 has 29 samples"),
        ((30, 30), (10, 12), "the held-out data is not the same on all ranks: rank 1 has 12 samples"),
    ],
)
def test_all_ranks_are_told_alike(tmp_path, train_rows, val_rows, says):
    def work(world):
        sets = [TensorSamples(torch.arange(float(rows[world.rank]))[:, None]) for rows in (train_rows, val_rows)]
        task = Task(model=nn.Linear(1, 1), train_data=sets[0], val_data=sets[1], loss_sums=loss)
        config = Config(train=TrainConfig(steps=1, global_batch_size=8))
        job = settle(task, config, world, RunDirectory(tmp_path), MetricLog(None, []))
        try:
            return list(compare_data(job))
        except DataError as error:
            return str(error)

    one, other = run_ranks(2, work)
    assert one == other
    assert one == ["training", "held-out"] if says is None else one.startswith(says)


def test_a_text_of_another_name_is_told_by_that_too(tmp_path, monkeypatch):
    for name in ("HOROVOD_FUSION_THRESHOLD", "MKL_NUM_THREADS", "OMPI_MCA_mpi_yield_when_idle"):
        monkeypatch.setenv(name, os.environ.get(name, "0"))  # which each start sets
    for name in ("old", "new"):
        (tmp_path / f"{name}.txt").write_text("some words, again and again. " * 200)

    def started(name, steps):
        hvdtrain.train(
            "lm",
            run_dir=tmp_path / "run",
            model={"num_layers": 1, "hidden_size": 8, "num_heads": 1},
            data={"path": str(tmp_path / f"{name}.txt"), "cache_dir": str(tmp_path / "cache"), "sequence_length": 16},
            train={"steps": steps, "global_batch_size": 2},
            eval={"every": None},
        )

    started("old", 1)
    with pytest.raises(ResumeError, match=r"the training data, or the name of a file of it, is not the same \(data\)"):
        started("new", 2)
