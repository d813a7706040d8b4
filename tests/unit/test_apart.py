"""What ranks that train apart have besides weights: buffers, and what goes on by other settings."""

import copy
import dataclasses
import math

import pytest
import torch
from thread_world import run_ranks
from torch import nn

from hvdtrain.data.dataset import TensorSamples
from hvdtrain.errors import DivergedError
from hvdtrain.optim.adamw import AdamWConfig
from hvdtrain.process.launch import Launch
from hvdtrain.rundir.directory import RunDirectory
from hvdtrain.rundir.log import MetricLog
from hvdtrain.settings import CommConfig, Config, TrainConfig
from hvdtrain.trainer import Task, settle, train_step
from hvdtrain.trainer.evaluation import evaluate
from hvdtrain.trainer.fragments import Schedule
from hvdtrain.trainer.saver import Saver
from hvdtrain.trainer.state import start_training
from hvdtrain.trainer.without_effect import without_effect
from hvdtrain.world import SoloWorld

STEPS = 11
WHOLE = {"period": 4}
STREAMED = {"period": 5, "fragments": 2, "overlap_steps": 2}


class Said(MetricLog):
    def __init__(self):
        super().__init__(None, [])
        self.said = []

    def say(self, text):
        self.said.append(text)


class Net(nn.Module):
    """With a normalisation, and a mean that is no part of its state."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)
        self.register_buffer("mean", torch.zeros(4), persistent=False)

    def forward(self, x):
        h = self.norm(self.first(x))
        if self.training:
            with torch.no_grad():
                self.mean.mul_(0.8).add_(0.2 * h.square().mean(0))
        return self.last(torch.tanh(h) * (1 + self.mean))


torch.manual_seed(0)
MODEL = Net()


def job_of(world, folder, bad=(), steps=STEPS, **comm):
    """Return a job; `bad` has ranks and the completed steps after which their loss is not finite."""
    x = torch.randn(36, 3, generator=torch.Generator().manual_seed(3)).double()
    data = TensorSamples(x, x.sin().sum(1, keepdim=True))
    config = Config(
        train=TrainConfig(steps=steps, global_batch_size=12, precision="fp64"),
        optim=AdamWConfig(peak_lr=0.02, schedule="constant"),
        comm=CommConfig(**{"sync": "local", "compression_min_size": 1, **comm}),
    )
    count = [0]

    def losses(model, batch):
        is_bad = model.training and (world.rank, count[0]) in bad
        out = model(batch[0] * (math.nan if is_bad else 1.0))
        return {"loss": (out - batch[1]).square().sum()}

    task = Task(model=copy.deepcopy(MODEL), train_data=data, val_data=data, loss_sums=losses)
    log = Said()
    job = settle(task, config, world, RunDirectory(folder), log)
    return dataclasses.replace(job, allowed_changes=("comm", "optim")), count, log


def state(model):
    return {name: tensor.detach().clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def equal(one, other):
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def trained(job, count, steps=STEPS):
    training = start_training(job)
    while training.step < steps:
        count[0] = training.step
        train_step(job, training)
    return training


def saved(job, training):
    with Saver(job) as saver:
        saver.save(training, {})
        saver.finish()


@pytest.mark.parametrize("comm", [WHOLE, STREAMED], ids=str)
@pytest.mark.parametrize("bad", [{(1, 0)}, {(1, 2)}, {(0, 3)}, {(1, 7), (0, 8)}, {(0, 3), (1, 3)}], ids=str)
def test_a_step_that_does_not_count_leaves_the_buffers_of_all_ranks_alone(tmp_path, comm, bad):
    """In the first period, at an average, before anything was averaged: else every later evaluation is nan."""

    def work(world):
        job, count, _ = job_of(world, tmp_path, bad, **comm)
        training = start_training(job)
        while training.step < 9:
            count[0], before = training.step, state(training.model)
            train_step(job, training)
            if (world.rank, count[0]) in bad and not training.strategy.is_equal_after(training.step):
                after = state(training.model)
                assert all(torch.equal(after[name], before[name]) for name, _ in training.model.named_buffers())
        loss = evaluate(job, training)["val/loss"]
        with training.strategy.made_equal(world, training):
            return loss, state(training.model)

    (loss, one), (_, other) = run_ranks(2, work)
    assert math.isfinite(loss)
    assert equal(one, other)
    assert all(tensor.isfinite().all() for tensor in one.values())


@pytest.mark.parametrize("sync", ["every-step", "local"])
def test_a_first_step_that_does_not_count_and_a_look_at_it_change_nothing_of_what_is_averaged(tmp_path, sync):
    """As with a loss scale that is too large at first: the buffers are then as they were before it."""

    def work(world):
        job, count, _ = job_of(world, tmp_path, {(0, 0), (1, 0)}, sync=sync, period=1)
        training, found = start_training(job), []
        while training.step < 3:
            count[0] = training.step
            train_step(job, training)
            found.append(state(training.model))
            training.before_looking()
        return found

    one, other = run_ranks(2, work)
    assert all(map(equal, one, other))


@pytest.mark.parametrize("comm", [WHOLE, STREAMED], ids=str)
def test_buffers_that_are_no_part_of_the_models_state_go_on(tmp_path, comm):
    """Bitwise on as many ranks, within a period and at its end; on others from the mean."""
    bad = {(1, 8)}

    def whole(world):
        job, count, _ = job_of(world, tmp_path / "whole", bad, **comm)
        return state(trained(job, count).model)

    def cut(step):
        def work(world):
            folder = tmp_path / f"cut-{step}"
            job, count, _ = job_of(world, folder, bad, **comm)
            training = trained(job, count, step)
            saved(job, training)
            with training.strategy.made_equal(world, training):
                mean = training.model.mean.clone()
            job, count, _ = job_of(world, folder, bad, **comm)
            return state(trained(job, count).model), mean

        return work

    def elsewhere(step):
        return lambda world: start_training(job_of(world, tmp_path / f"cut-{step}", **comm)[0]).model.mean.clone()

    expected = run_ranks(2, whole)
    for step in (3, 4, 8):
        found = run_ranks(2, cut(step))
        for one, (other, _) in zip(expected, found, strict=True):
            assert equal(one, other)
        assert found[0][1].any()
        for size in (1, 3):
            for mean in run_ranks(size, elsewhere(step)):
                torch.testing.assert_close(mean, found[0][1])


@pytest.mark.parametrize(("sync", "is_shared"), [("local", False), ("every-step", True)])
def test_a_rank_that_ends_alone_says_that_the_others_do_not(tmp_path, sync, is_shared):
    """It waited for them to part, who waited for it in the next average, and nothing was printed."""

    def work(world):
        job, count, _ = job_of(world, tmp_path, {(1, step) for step in range(30)}, steps=30, sync=sync, period=30)
        limit = dataclasses.replace(job.config.health, max_skipped_steps=3)
        job = dataclasses.replace(job, config=dataclasses.replace(job.config, health=limit))
        try:
            trained(job, count, 9)
        except DivergedError as error:
            return error.is_on_all_ranks
        return None

    assert run_ranks(2, work) == ([True, True] if is_shared else [None, False])


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("comm", [WHOLE, STREAMED], ids=str)
def test_an_evaluation_before_the_first_step_hides_no_buffer(tmp_path, comm, size):
    """As one that a stop has left due: running statistics were each one's own ever after, on other ranks."""

    def first(world):
        job, count, _ = job_of(world, tmp_path, **BEGUN["apart"])
        saved(job, trained(job, count, 6))

    def then(world, looks):
        job, count, _ = job_of(world, tmp_path, **comm)
        training = start_training(job)
        if looks:
            evaluate(job, training)
        while training.step < 9:
            count[0] = training.step
            train_step(job, training)
        with training.strategy.made_equal(world, training):
            return state(training.model)

    run_ranks(2, first)
    without, with_it = (run_ranks(size, lambda world, looks=looks: then(world, looks)) for looks in (False, True))
    assert all(equal(without[0], other) for other in (*without, *with_it))


BEGUN = {
    "apart": WHOLE,
    "parts": STREAMED | {"compression": "int8"},
    "topk": {"sync": "every-step", "compression": "topk:0.2"},
    "nesterov": WHOLE | {"outer": "nesterov"},
}


@pytest.mark.parametrize(
    ("begun", "goes_on", "size", "says"),
    [
        ("apart", {"sync": "every-step"}, 2, "2 ranks have trained apart, and 2 go on averaging gradients in every"),
        ("apart", {"sync": "every-step"}, 3, "2 ranks have trained apart, and 3 go on averaging gradients in every"),
        ("apart", {"sync": "every-step"}, 1, "2 ranks have trained apart, and one goes on: from the mean"),
        ("apart", WHOLE, 1, "2 ranks have trained apart, and one goes on: from the mean"),
        ("apart", WHOLE, 2, None),
        ("apart", WHOLE | {"outer": "nesterov"}, 2, None),
        ("apart", {"period": 3}, 2, "by the settings of now they are equal after step 6: they go on from the mean"),
        ("parts", STREAMED | {"compression": "int8", "sync_warmup_steps": 7}, 2, "they are equal after step 6: they"),
        ("parts", STREAMED | {"compression": "int8", "fragments": 3}, 2, "updates still to send, and go on with other"),
        ("parts", STREAMED | {"compression": "int8", "fragments": 1}, 3, "updates still to send, and go on with other"),
        ("parts", STREAMED, 2, "updates still to send, and go on with --comm.compression none: it is dropped"),
        ("parts", STREAMED | {"compression": "powersgd:1"}, 2, None),
        ("topk", {"sync": "every-step"}, 2, "2 ranks had a part of their gradients still to send, and --comm.comp"),
        ("topk", {"sync": "every-step"}, 3, "2 ranks had a part of their gradients still to send, and --comm.comp"),
        ("topk", WHOLE, 2, "still to send, and 2 go on by --comm.sync local: it is dropped"),
        ("topk", WHOLE, 3, "still to send, and 3 go on by --comm.sync local: it is dropped"),
        ("topk", {"sync": "every-step", "compression": "int8"}, 2, None),
        ("nesterov", WHOLE, 2, "averages had a momentum (--comm.outer nesterov), and go on without: it is dropped"),
        ("nesterov", WHOLE | {"outer": "nesterov", "outer_momentum": 0.5}, 2, None),
    ],
)
def test_what_other_settings_drop_is_said(tmp_path, begun, goes_on, size, says):
    def first(world):
        job, count, _ = job_of(world, tmp_path, **BEGUN[begun])
        saved(job, trained(job, count, 6))

    def then(world):
        job, count, log = job_of(world, tmp_path, **goes_on)
        training = trained(job, count, 8)
        with training.strategy.made_equal(world, training):
            return [line for line in log.said if line.startswith("WARNING")], state(training.model)

    run_ranks(2, first)
    found = run_ranks(size, then)
    assert all(equal(found[0][1], other) for _, other in found)
    lines = found[0][0]
    assert any(says in line for line in lines) if says else lines == []


def test_what_would_begin_after_the_last_step_is_said(tmp_path):
    def lines(steps, size=2, **comm):
        def work(world):
            return without_effect(job_of(world, tmp_path, steps=steps, **comm)[0])

        return run_ranks(size, work)[0]

    assert lines(4, period=4) == []
    assert "no effect of --comm.period 5 and what belongs to it: in 4 steps, no average" in lines(4, period=5)[0]
    assert "in 9 steps, 6 of them warm-up, no" in lines(9, period=4, sync_warmup_steps=6)[0]
    assert lines(4, period=9, fragments=3) == []
    assert lines(4, period=9, fragments=3, overlap_steps=2) != []
    assert lines(4, period=2, compression="int8", compression_warmup_steps=1) == []
    (line,) = lines(4, period=2, compression="int8", compression_warmup_steps=2)
    assert "of the 2 averages of this run the first 2 send everything as it is" in line
    (line,) = lines(4, sync="every-step", compression="topk:0.1", compression_warmup_steps=4)
    assert "no effect of --comm.compression topk:0.1: of the 4 steps" in line
    assert lines(4, sync="every-step", compression="topk:0.1", compression_warmup_steps=3) == []


@pytest.mark.parametrize("warmup", [0, 3, 40])
@pytest.mark.parametrize(("period", "fragments", "late"), [(1, 1, 0), (4, 1, 0), (4, 1, 3), (7, 3, 0), (7, 7, 6)])
def test_averages_of_a_run_are_those_of_its_steps(period, fragments, late, warmup):
    schedule = Schedule(period, fragments, late, warmup)
    for steps in range(1, 31):
        sent = [p for step in range(1, steps + 1) for p in schedule.begins(step)]
        assert schedule.averages(steps) == max((sent.count(p) for p in range(fragments)), default=0)
        taken = [step for step in range(1, steps + 1) if schedule.ends(step) and not schedule.warms_up(step)]
        assert schedule.ever_ends(steps) == bool(taken)


def test_one_rank_has_nothing_to_say_of_periods(tmp_path):
    world = SoloWorld(torch.device("cpu"), Launch("none"))
    assert all("no average" not in line for line in without_effect(job_of(world, tmp_path, steps=2)[0]))
