"""Users' data on N ranks: the same weights as in one process, and ranks that hold different data are told at once."""

import os
import shutil
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from users_data import Endless, Vectors

from hvdtrain import Task
from hvdtrain.data.samplers import InOrder, Weighted
from hvdtrain.errors import DataError, WorkerError
from hvdtrain.process.launch import Launch
from hvdtrain.rundir.directory import RunDirectory
from hvdtrain.rundir.log import MetricLog
from hvdtrain.settings import CheckpointConfig, Config, DataConfig, LogConfig, OptimConfig, TrainConfig
from hvdtrain.trainer import fit, settle
from hvdtrain.world import SoloWorld

SOLO = SoloWorld(torch.device("cpu"), Launch("none"))


def loss(model, batch):
    x, y = batch
    return {"loss": F.mse_loss(model(x), y.to(x.dtype), reduction="sum")}


def train(world, folder, data, steps=6, *, val_data=None, workers=0, **more):
    torch.manual_seed(0)
    held_out = val_data or Vectors(10, seed=9)
    task = Task(model=nn.Linear(4, 1), train_data=data, val_data=held_out, loss_sums=loss, **more)
    config = Config(
        train=TrainConfig(steps=steps, global_batch_size=8, precision="fp64"),
        optim=OptimConfig(schedule="constant"),
        log=LogConfig(every=1),
        checkpoint=CheckpointConfig(every=1),
        data=DataConfig(workers=workers),
    )
    folder.mkdir(exist_ok=True, parents=True)
    job = world.together(lambda: settle(task, config, world, RunDirectory(folder), MetricLog(None, [])), "settle")
    metrics = fit(job)
    return torch.cat([value.detach().flatten() for value in (*task.model.parameters(),)]), metrics["val/loss"]


class EasyFirst:
    """A curriculum, as `hvdtrain.data.samplers.Sampler` has it."""

    def __init__(self, difficulty):
        self.ranked = np.argsort(difficulty, kind="stable")

    def samples(self, positions, num_samples, seed, epoch):
        return self.ranked[positions]


NORMS = Vectors().x.norm(dim=1).numpy()
CASES = {
    "samples": (Vectors, {}),
    "workers": (Vectors, {"workers": 1}),
    "weighted": (Vectors, {"sampler": Weighted(range(30))}),
    "curriculum, without the rest": (Vectors, {"sampler": EasyFirst(NORMS), "drop_last": True}),
    "in order": (Vectors, {"sampler": InOrder()}),
    "stream": (lambda: Endless(vectors=True), {}),
}


@pytest.mark.ranks(2)
@pytest.mark.same_on_gloo
@pytest.mark.parametrize("name", CASES)
def test_n_ranks_give_what_one_gives(world, shared_dir, tmp_path, name):
    """Samples draw at random; the run is interrupted, and goes on with one process alone."""
    make, more = CASES[name]
    alone = {key: value for key, value in more.items() if key != "workers"}
    wanted, wanted_loss = train(SOLO, tmp_path / "alone", make(), **alone)
    weights, value = train(world, shared_dir / "all", make(), **more)
    assert (weights - wanted).abs().max() < 1e-12
    assert value == pytest.approx(wanted_loss, rel=1e-12)
    train(world, shared_dir / "part", make(), 3, **more)
    world.barrier("part")
    own = shared_dir / f"rank-{world.rank}"
    shutil.copytree(shared_dir / "part", own)
    resumed, _ = train(SOLO, own, make(), **alone)
    assert (resumed - wanted).abs().max() < 1e-12


@pytest.mark.ranks(2, 4)
@pytest.mark.parametrize(
    ("data", "says"),
    [
        (lambda rank: {"data": Vectors(30 - rank)}, "the training data .* samples, and the others"),
        (lambda rank: {"data": Vectors(30, seed=int(rank == 1))}, "the training data .* rank 1 has other samples"),
        (
            lambda rank: {"data": Vectors(), "val_data": Vectors(10 + (rank == 1))},
            "held-out data .* rank 1 has 11 samples",
        ),
    ],
    ids=["length", "samples", "held-out"],
)
def test_ranks_with_different_data_are_told(world, shared_dir, data, says):
    more = data(world.rank)
    with pytest.raises(DataError, match=says) as caught:
        train(world, shared_dir, more.pop("data"), **more)
    assert len(set(world.all_gather_object(str(caught.value), "said"))) == 1


@pytest.mark.ranks(1)
def test_a_worker_that_dies_is_named(world, tmp_path):
    with pytest.raises(WorkerError, match=r"data worker 0 of rank 0 \(process \d+\) was killed by SIGKILL"):
        train(SOLO, tmp_path, Fatal(), workers=1)


class Fatal(Vectors):
    """Fine in the rank, which looks at it when training starts; its worker is killed."""

    def __getitem__(self, i):
        if "HVDTRAIN_DATA_WORKER" in os.environ:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.zeros(4), torch.zeros(1)
