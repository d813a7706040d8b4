"""The room that checkpoints will take, against what they do take, and the warning where the disk has less."""

import itertools
import shutil

import pytest
import torch
from torch import nn

from hvdtrain.data.dataset import TensorSamples
from hvdtrain.process.launch import Launch
from hvdtrain.rundir.directory import RunDirectory
from hvdtrain.rundir.log import MetricLog
from hvdtrain.settings import CheckpointConfig, Config, EvalConfig, OptimConfig, TrainConfig
from hvdtrain.trainer import Task, fit, settle
from hvdtrain.trainer.memory import estimate
from hvdtrain.trainer.space import checkpoint_bytes, kept_at_once, space_warning
from hvdtrain.world import SoloWorld


def job_of(folder, build, /, **sections):
    data = TensorSamples(torch.randn(20, 4), torch.randn(20, 1))

    def loss_sums(model, batch):
        return {"loss": (model(batch[0]) - batch[1]).square().sum()}

    config = Config(**{"train": TrainConfig(steps=20, global_batch_size=4), **sections})
    task = Task(model=build(), train_data=data, val_data=data, loss_sums=loss_sums)
    world = SoloWorld(torch.device("cpu"), Launch("none"))
    return settle(task, config, world, RunDirectory(folder), MetricLog(None, []))


def network():
    return nn.Sequential(nn.Linear(4, 20_000), nn.BatchNorm1d(20_000), nn.ReLU(), nn.Linear(20_000, 1))


def far_too_large():
    """Return 40 TiB of weights, of which nothing is allocated."""
    sizes = [4, 1 << 20, 10 << 20, 1]
    return nn.Sequential(*(nn.Linear(a, b, device="meta") for a, b in itertools.pairwise(sizes)))


def size_of(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", ["sgd", "adamw", "muon"])
@pytest.mark.parametrize("ema", [None, 0.9])
def test_a_checkpoint_is_as_large_as_it_was_said_to_be(tmp_path, name, ema):
    train = TrainConfig(steps=2, global_batch_size=4, ema=ema, micro_batch_size=4)
    job = job_of(tmp_path / "run", network, train=train, optim=OptimConfig(name=name))
    said = checkpoint_bytes(job)
    fit(job)
    assert size_of(job.run.checkpoints.path_of(2)) == pytest.approx(said, rel=0.05)


@pytest.mark.parametrize("keep_last", [1, 3, None])
@pytest.mark.parametrize("keep_every", [None, 6])
@pytest.mark.parametrize("evaluated", [None, 5])
def test_as_many_checkpoints_as_there_ever_are(tmp_path, keep_last, keep_every, evaluated):
    kept = CheckpointConfig(every=2, keep_last=keep_last, keep_every=keep_every if keep_last else None)
    job = job_of(tmp_path / "run", network, checkpoint=kept, eval=EvalConfig(every=evaluated))
    said = kept_at_once(job)
    fit(job)
    most = len(job.run.checkpoints.by_step())
    assert most <= said  # one is written before another goes
    assert said <= most + (3 if evaluated else 2)


def test_little_room_is_said_before_the_first_step(tmp_path):
    job = job_of(tmp_path / "not" / "yet", far_too_large)
    (line,) = space_warning(job)
    assert shutil.disk_usage(tmp_path).free < estimate(job).weights
    assert "a checkpoint takes about 120 TiB" in line  # with AdamW's two moments
    assert "for 0 of the " in line
    assert f"{tmp_path} has" in line
    assert not (tmp_path / "not").exists()


@pytest.mark.parametrize(
    "folder", ["run", "/proc/none/there"]
)  # which has no room at all, as all that is there is made up
def test_enough_room_is_not_spoken_of(tmp_path, folder):
    assert space_warning(job_of(tmp_path / folder, network)) == []
