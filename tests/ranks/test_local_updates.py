"""Local updates: the textbook's formula to the letter, and exact through saves, stops and other numbers of ranks."""

import contextlib
import copy
import dataclasses
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from hvdtrain.data.dataset import TensorSamples
from hvdtrain.errors import ConfigError
from hvdtrain.optim.adamw import AdamWConfig
from hvdtrain.optim.sgd import SgdConfig
from hvdtrain.rundir.directory import RunDirectory
from hvdtrain.rundir.log import MetricLog
from hvdtrain.settings import CheckpointConfig, CommConfig, Config, EvalConfig, HealthConfig, TrainConfig
from hvdtrain.trainer import Task, fit, settle, train_step
from hvdtrain.trainer.line import step_metrics
from hvdtrain.trainer.local_updates import OuterUpdates
from hvdtrain.trainer.state import start_training
from hvdtrain.trainer.stopwatch import Stopwatch

STEPS, LR = 10, 0.05


def made(normalised):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8) if normalised else nn.Tanh(), nn.Linear(8, 1))


def losses(model, batch):
    return {"loss": (model(batch[0]) - batch[1]).square().sum()}


def job_of(world, run_dir, *, steps=STEPS, optim=None, normalised=False, eval_every=None, save_every=None, **comm):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(44, 5, generator=generator).double()
    data = TensorSamples(x, x.sin().sum(1, keepdim=True))
    config = Config(
        train=TrainConfig(steps=steps, global_batch_size=16, precision="fp64", max_grad_norm=None),
        optim=optim or SgdConfig(peak_lr=LR, weight_decay=0.0, schedule="constant"),
        comm=CommConfig(**{"sync": "local", "period": 4, **comm}),
        eval=EvalConfig(every=eval_every),
        checkpoint=CheckpointConfig(every=save_every, keep_last=None),
        health=HealthConfig(replica_check_every=1),
    )
    task = Task(model=made(normalised), train_data=data, val_data=data, loss_sums=losses)
    return settle(task, config, world, RunDirectory(run_dir), MetricLog(None, []))


def weights(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def trained(job, steps=STEPS):
    training = start_training(job)
    for _ in range(steps):
        train_step(job, training)
    return training


def largest_gap(a, b):
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a)


def by_formula(job, steps, outer_lr, momentum):
    """W <- W + eta x mean_i(W_i - W), all workers in one process, each by a torch optimizer of its own."""
    size, order = job.world.size, job.order
    model = copy.deepcopy(job.task.model).double()
    outer = torch.optim.SGD(model.parameters(), lr=outer_lr, momentum=momentum, nesterov=momentum > 0)
    workers = [copy.deepcopy(model) for _ in range(size)]
    optimizers = [torch.optim.SGD(worker.parameters(), lr=LR) for worker in workers]
    for step in range(steps):
        samples = order.global_batch(step)
        for rank, (worker, optimizer) in enumerate(zip(workers, optimizers, strict=True)):
            optimizer.zero_grad()
            for positions in order.micro_batches(step, rank):
                batch = job.task.train_data.batch(samples[positions])
                (losses(worker, batch)["loss"] * size / len(samples)).backward()
            optimizer.step()
        if (step + 1) % job.config.comm.period == 0:
            for parameter, *own in zip(model.parameters(), *(w.parameters() for w in workers), strict=True):
                parameter.grad = parameter.detach() - torch.stack([p.detach() for p in own]).mean(0)
            outer.step()
            for worker in workers:
                worker.load_state_dict(model.state_dict())
    return model, workers[job.world.rank]


@pytest.mark.ranks(2, 4)
@pytest.mark.parametrize(
    ("comm", "outer_lr", "momentum"),
    [
        ({}, 1.0, 0.0),
        ({"outer_lr": 0.5, "bucket_mib": 1}, 0.5, 0.0),
        ({"outer": "nesterov", "outer_momentum": 0.9}, 0.7, 0.9),  # DiLoCo's
        ({"outer": "nesterov"}, 0.7, None),
        ({"outer": "nesterov", "outer_lr": 0.3, "outer_momentum": 0.5, "period": 3}, 0.3, 0.5),
    ],
)
def test_updates_are_averaged_by_the_formula(world, shared_dir, comm, outer_lr, momentum):
    job = job_of(world, shared_dir / "run", **comm)
    momentum = 1 - outer_lr / world.size**0.5 if momentum is None else momentum
    expected, own = by_formula(job, STEPS, outer_lr, momentum)
    training = trained(job)
    assert largest_gap(weights(training.model), weights(own)) < 1e-12
    assert largest_gap(training.component(OuterUpdates).state_dict()["last"], weights(expected)) < 1e-12


@pytest.mark.ranks(2, 4)
@pytest.mark.same_on_gloo
def test_a_period_of_one_is_averaging_gradients(world, shared_dir):
    local = trained(job_of(world, shared_dir / "local", period=1))
    together = trained(job_of(world, shared_dir / "all", sync="every-step", period=50))
    assert largest_gap(weights(local.model), weights(together.model)) < 1e-12


@pytest.mark.ranks(2)
@pytest.mark.parametrize("compression", ["fp16", "bf16"])
def test_updates_are_sent_in_few_bits(world, shared_dir, compression):
    rough = trained(job_of(world, shared_dir / "rough", compression=compression), 8)
    exact = trained(job_of(world, shared_dir / "exact"), 8)
    gap = largest_gap(weights(rough.model), weights(exact.model))
    assert 0 < gap < 1e-2


@pytest.mark.ranks(2)
@pytest.mark.parametrize("outer", ["average", "nesterov"])
def test_looking_changes_nothing_and_a_run_goes_on_bitwise(world, shared_dir, outer):
    """Saves, evaluations and the stop fall within periods; the normalisation's statistics are each rank's own there."""
    settings = {"optim": AdamWConfig(peak_lr=0.01, schedule="constant"), "normalised": True, "outer": outer}
    whole = trained(job_of(world, shared_dir / "whole", **settings))
    looked = job_of(world, shared_dir / "looked", **settings, eval_every=3, save_every=2)
    fit(looked)
    fit(job_of(world, shared_dir / "cut", **settings, steps=6, save_every=2))
    went_on = trained(job_of(world, shared_dir / "cut", **settings), STEPS - 6)
    assert largest_gap(weights(went_on.model), weights(whole.model)) == 0
    mean = {name: world.all_reduce(t.double(), "mean", f"mean.{name}") for name, t in weights(whole.model).items()}
    counts = {name for name in mean if name.endswith("num_batches_tracked")}
    final = weights(looked.task.model)
    assert largest_gap({name: final[name] for name in mean.keys() - counts}, mean) < 1e-12
    assert len({str(value) for value in world.all_gather_object({k: v.tolist() for k, v in final.items()})}) == 1


@pytest.mark.ranks(4)
@pytest.mark.same_on_gloo
def test_another_number_of_ranks_goes_on_from_the_mean(world, shared_dir, tmp_path, capsys):
    """Here one rank goes on where four have stopped within a period."""
    fit(job_of(world, shared_dir / "run", steps=6, save_every=2))
    if world.rank:
        return
    from hvdtrain.process.launch import Launch
    from hvdtrain.rundir.checkpoint import load_checkpoint
    from hvdtrain.world import SoloWorld

    job = job_of(SoloWorld(world.device, Launch("none")), shared_dir / "run", sync="every-step", period=50)
    job = dataclasses.replace(job, allowed_changes=("comm",))
    training = start_training(job)
    saved = load_checkpoint(job.run.checkpoints.by_step()[6]).weights
    assert largest_gap(weights(training.model), saved) == 0
    train_step(job, training)


@pytest.mark.ranks(2)
@pytest.mark.same_on_gloo
def test_a_step_that_is_not_finite_is_left_out_by_its_rank_alone(world, shared_dir):
    job = job_of(world, shared_dir / "run")

    def broken(model, batch):
        sums = losses(model, batch)
        return {"loss": sums["loss"] * (float("nan") if world.rank == 1 and training.step == 1 else 1.0)}

    job = dataclasses.replace(job, task=dataclasses.replace(job.task, loss_sums=broken))
    training = start_training(job)
    train_step(job, training)
    before = weights(training.model)
    train_step(job, training)
    assert (largest_gap(weights(training.model), before) == 0) == (world.rank == 1)
    for _ in range(2):
        train_step(job, training)
    metrics = step_metrics(job, training, Stopwatch())
    assert metrics["train/skipped_steps"] == 1


@pytest.mark.ranks(2)
@pytest.mark.same_on_gloo
def test_what_needs_equal_ranks_is_refused(world, shared_dir):
    job = job_of(world, shared_dir / "run")
    config = dataclasses.replace(job.config, train=dataclasses.replace(job.config.train, ema=0.9))
    with pytest.raises(ConfigError, match=r"--train\.ema needs .* --comm\.sync local"):
        settle(job.task, config, world, RunDirectory(shared_dir / "run"), MetricLog(None, []))


def test_averages_that_may_be_late_leave_the_processors_to_training(world, shared_dir):
    """Horovod's thread has a lower priority then, for good, and the one that trains its own."""
    before = os.getpriority(os.PRIO_PROCESS, 0)
    fit(job_of(world, shared_dir, overlap_steps=2))
    assert os.getpriority(os.PRIO_PROCESS, 0) == before
    nicer = []
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(ProcessLookupError):  # one of the training's that has just ended
            nicer += [thread] * (os.getpriority(os.PRIO_PROCESS, int(thread.name)) > before)
    assert bool(nicer) == (world.size > 1)
