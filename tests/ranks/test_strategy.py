"""A second, made-up strategy: ranks train apart and average their weights every few steps. Nothing else changes."""

import contextlib
import dataclasses

import pytest
import torch
from torch import nn

from hvdtrain.data.dataset import TensorSamples
from hvdtrain.errors import DivergedError
from hvdtrain.process.launch import Launch
from hvdtrain.rundir.checkpoint import load_checkpoint
from hvdtrain.rundir.directory import RunDirectory
from hvdtrain.rundir.log import MetricLog
from hvdtrain.settings import CheckpointConfig, Config, EvalConfig, HealthConfig, OptimConfig, TrainConfig
from hvdtrain.trainer import Task, fit, settle, train_step
from hvdtrain.trainer.ema import WeightAverage
from hvdtrain.trainer.state import start_training
from hvdtrain.trainer.strategy import EveryStep, model_tensors
from hvdtrain.world import SoloWorld


def list_checkpoints(run_dir):
    return list(RunDirectory(run_dir).checkpoints.by_step().values())


class LocalAveraging(EveryStep):
    """Ranks average their weights after every `every` steps; the optimizer's state stays each one's own."""

    def __init__(self, every):
        self.every = every

    def wrap(self, world, optimizer, model, **options):
        return SoloWorld(world.device, Launch("none")).wrap(optimizer, model)

    def is_equal_after(self, step):
        return step % self.every == 0

    def agree(self, world, is_finite):
        return world.all_reduce(is_finite.float(), "min", "local.finite").bool()

    def after_update(self, world, training):
        if self.is_equal_after(training.step):
            for tensor in model_tensors(training.model).values():
                tensor.data.copy_(world.all_reduce(tensor.detach().double(), "mean", "local.average"))

    @contextlib.contextmanager
    def made_equal(self, world, training):
        kept = {name: tensor.detach().clone() for name, tensor in model_tensors(training.model).items()}
        for name, tensor in model_tensors(training.model).items():
            tensor.data.copy_(world.all_reduce(tensor.detach().double(), "mean", f"local.{name}"))
        yield
        for name, tensor in model_tensors(training.model).items():
            tensor.data.copy_(kept[name])

    def replicated_tensors(self, training, with_optimizer):
        return model_tensors(training.model) if self.is_equal_after(training.step) else {}


def job_of(world, run_dir, strategy, **train):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(64, 5, generator=generator).double()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    data = TensorSamples(x, x.sin().sum(1, keepdim=True))

    def loss(model, batch):
        return {"loss": (model(batch[0]) - batch[1]).square().sum()}

    config = Config(
        train=TrainConfig(**{"steps": 10, "global_batch_size": 16, "precision": "fp64", **train}),
        optim=OptimConfig(name="sgd", peak_lr=0.02),
        eval=EvalConfig(every=5),
        checkpoint=CheckpointConfig(every=3, keep_last=None),
        health=HealthConfig(replica_check_every=1),
    )
    task = Task(model=model, train_data=data, val_data=data, loss_sums=loss)
    job = settle(task, config, world, RunDirectory(run_dir), MetricLog(None, []))
    return dataclasses.replace(job, strategy=strategy)


def digests(world, model):
    values = torch.cat([tensor.detach().double().flatten() for tensor in model_tensors(model).values()])
    return [digest.tolist() for digest in world.all_gather_object(values, "strategy")]


@pytest.mark.ranks(2, 4)
def test_ranks_drift_apart_and_meet_again(world, shared_dir):
    job = job_of(world, shared_dir / "run", LocalAveraging(4))
    training = start_training(job)
    for step in range(1, 9):
        train_step(job, training)
        is_equal = len({str(values) for values in digests(world, training.model)}) == 1
        assert is_equal == (step % 4 == 0)


@pytest.mark.ranks(2)
@pytest.mark.same_on_gloo
def test_a_whole_run_saves_and_evaluates_what_all_hold(world, shared_dir):
    metrics = fit(job_of(world, shared_dir / "run", LocalAveraging(4)))  # checks replicas in every step
    assert len(set(world.all_gather_object(metrics["val/loss"], "loss"))) == 1
    assert [path.name for path in list_checkpoints(shared_dir / "run")] == [
        f"step-{step:08d}" for step in (3, 5, 6, 9, 10)
    ]
    assert torch.isfinite(load_checkpoint(list_checkpoints(shared_dir / "run")[0]).weights["0.weight"]).all()


@pytest.mark.ranks(2)
@pytest.mark.same_on_gloo
def test_who_believes_that_ranks_are_equal_is_found_out(world, shared_dir):
    strategy = LocalAveraging(4)
    strategy.is_equal_after = lambda step: True
    strategy.after_update = lambda world, training: None
    with pytest.raises(DivergedError, match="differs"):
        fit(job_of(world, shared_dir / "run", strategy))


@pytest.mark.ranks(2)
@pytest.mark.same_on_gloo
def test_the_average_of_weights_is_that_of_one_process(world, shared_dir, tmp_path):
    """Without batch normalisation's own statistics, whose values depend on how a batch is cut."""
    averages = []
    for where, folder in ((world, shared_dir / "all"), (SoloWorld(world.device, Launch("none")), tmp_path / "one")):
        job = job_of(where, folder, EveryStep(), ema=0.9, accum_steps=1)
        job = dataclasses.replace(job, task=dataclasses.replace(job.task, model=nn.Sequential(nn.Linear(5, 1))))
        torch.manual_seed(1)
        nn.init.normal_(job.task.model[0].weight)
        nn.init.zeros_(job.task.model[0].bias)
        training = start_training(job)
        for _ in range(10):
            train_step(job, training)
        averages.append(training.component(WeightAverage).evaluated_weights()["0.weight"].clone())
    assert (averages[0] - averages[1]).abs().max() < 1e-12
    assert len({str(values.tolist()) for values in world.all_gather_object(averages[0], "average")}) == 1
