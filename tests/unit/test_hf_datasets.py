"""Data sets of the library `datasets`: in memory, from disk, and streams, given to `Task` as they are."""

import gc

import pytest
import torch

from hvdtrain.data.dataset import TensorSamples
from hvdtrain.data.users import as_dataset
from hvdtrain.process.launch import Launch
from hvdtrain.rundir.directory import RunDirectory
from hvdtrain.rundir.log import MetricLog
from hvdtrain.settings import CheckpointConfig, Config, LogConfig, OptimConfig, TrainConfig
from hvdtrain.trainer import Task, fit, settle
from hvdtrain.world import SoloWorld

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def without_threads_of_streams():
    """End the library's threads of streams that nobody reads any more."""
    yield
    gc.collect()


SOLO = SoloWorld(torch.device("cpu"), Launch("none"))
ROWS = [[float(i), float(i % 5), float(i % 3)] for i in range(30)]


def in_memory(folder):
    return datasets.Dataset.from_dict({"x": ROWS, "y": [sum(row) for row in ROWS]}).with_format("torch")


def from_disk(folder):
    if not (folder / "saved").exists():
        in_memory(folder).save_to_disk(folder / "saved")
    return datasets.load_from_disk(folder / "saved").with_format("torch")


def stream(folder):
    return in_memory(folder).to_iterable_dataset(num_shards=3).with_format("torch")


def shuffled(folder):
    """A stream whose state leaves out what its buffer holds."""
    return stream(folder).shuffle(seed=1, buffer_size=7)


def mixed(folder):
    both = datasets.interleave_datasets([shuffled(folder), stream(folder)], stopping_strategy="all_exhausted")
    return both.with_format("torch")


def loss(model, batch):
    return {"loss": (model(batch["x"] / 30).squeeze(1) - batch["y"] / 30).square().sum()}


def trained(data, run_dir, steps, kind=loss):
    torch.manual_seed(0)
    held_out = in_memory(run_dir.parent) if kind is loss else data
    task = Task(model=torch.nn.Linear(3, 1), train_data=data, val_data=held_out, loss_sums=kind)
    config = Config(
        train=TrainConfig(steps=steps, global_batch_size=8),
        optim=OptimConfig(peak_lr=0.05, schedule="constant"),
        log=LogConfig(every=1),
        checkpoint=CheckpointConfig(every=1),
    )
    run_dir.mkdir(exist_ok=True)
    fit(settle(task, config, SOLO, RunDirectory(run_dir), MetricLog(None, [])))
    return torch.cat([parameter.detach().flatten() for parameter in task.model.parameters()])


@pytest.mark.parametrize("made", [in_memory, from_disk, stream, shuffled, mixed], ids=lambda made: made.__name__)
def test_a_run_goes_on_exactly(tmp_path, made):
    """Beyond the end of a pass, too."""
    whole = trained(made(tmp_path), tmp_path / "whole", 9)
    for steps in (2, 5, 9):
        parts = trained(made(tmp_path), tmp_path / "parts", steps)
    assert torch.equal(parts, whole)


def test_they_are_trained_on_as_tensors_are(tmp_path):
    x = torch.tensor(ROWS)

    def of_tensors(model, batch):
        return loss(model, {"x": batch[0], "y": batch[1]})

    wanted = trained(TensorSamples(x, x.sum(1)), tmp_path / "tensors", 6, of_tensors)
    for made in (in_memory, from_disk):
        assert torch.equal(trained(made(tmp_path), tmp_path / made.__name__, 6), wanted)


def test_the_state_of_a_stream_is_used_where_it_holds_all(tmp_path):
    assert as_dataset(stream(tmp_path)).state_at(0)["stream"] is not None
    for made in (shuffled, mixed):
        assert as_dataset(made(tmp_path)).state_at(0)["stream"] is None
