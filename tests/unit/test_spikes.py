"""Spikes of gradients and losses: planted ones are named, left out or end the run; healthy runs raise no alarm."""

import math
import random

import pytest
import torch
from test_components import Lines
from thread_world import run_ranks
from torch import nn

from hvdtrain.data.dataset import TensorSamples
from hvdtrain.errors import ConfigError, DivergedError
from hvdtrain.process.launch import Launch
from hvdtrain.rundir.directory import RunDirectory
from hvdtrain.settings import CheckpointConfig, CommConfig, Config, HealthConfig, LogConfig, OptimConfig, TrainConfig
from hvdtrain.trainer import Task, fit, settle, train_step
from hvdtrain.trainer.local_updates import strategy_of
from hvdtrain.trainer.running_scale import RunningScale
from hvdtrain.trainer.saved_state import training_state
from hvdtrain.trainer.spikes import (
    DEVIATIONS,
    EVERY,
    IN_A_ROW,
    LEAST_LOSSES,
    LEAST_NORMS,
    LOSS_FACTOR,
    LOSSES,
    NORM_FACTOR,
    NORMS,
    Spikes,
)
from hvdtrain.trainer.state import start_training
from hvdtrain.world import SoloWorld

STEPS, BAD = 60, 50


class Device(SoloWorld):
    """A CPU that is treated as a GPU is: nobody waits for it."""

    reads_at_once = False


def job_of(folder, spikes, world=None, bad=(BAD,), times=100.0, every=2, steps=STEPS, optim="sgd", seed=0):
    """Return a job of a linear regression whose bad steps have targets that are so many times as large."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(32 * STEPS, 3, generator=generator)
    y = x.sum(1, keepdim=True) + torch.randn(len(x), 1, generator=generator)

    def loss_sums(model, batch):
        return {"loss": ((model(batch[0]) - batch[1]) ** 2).sum()}

    model, data = nn.Linear(3, 1), TensorSamples(x, y)
    for parameter in model.parameters():  # of ranks that are threads, one would draw between another's draws
        nn.init.constant_(parameter, 0.1)
    config = Config(
        train=TrainConfig(steps=steps, global_batch_size=32, max_grad_norm=None),
        optim=OptimConfig(name=optim, peak_lr=0.01, schedule="constant"),
        health=HealthConfig(spikes=spikes),
        log=LogConfig(every=every),
        checkpoint=CheckpointConfig(every=10),
    )
    task = Task(model=model, train_data=data, val_data=data, loss_sums=loss_sums)
    world = world or SoloWorld(torch.device("cpu"), Launch("none"))
    job = settle(task, config, world, RunDirectory(folder), Lines())
    for step in bad:
        y[job.order.global_batch(step - 1)] *= times
    return job


def warned(job):
    return [line for line in job.log.said if "WARNING" in line]


def spikes_logged(job):
    return [(step, line["train/spikes"]) for step, line in job.log.lines if "train/spikes" in line]


def test_a_planted_spike_is_named_once(tmp_path):
    job = job_of(tmp_path, "warn")
    fit(job)
    norm, loss = warned(job)[:2]
    assert "step 50: a spike: the gradient norm is" in norm
    assert "step 50: a spike: the mean loss since the last line" in loss
    assert spikes_logged(job)[0] == (50, 2)


def test_nothing_is_said_where_it_is_off(tmp_path):
    job = job_of(tmp_path, "off")
    fit(job)
    assert warned(job) == []
    assert spikes_logged(job) == []


@pytest.mark.parametrize("world", [SoloWorld, Device])
@pytest.mark.parametrize("optim", ["sgd", "adamw"])
@pytest.mark.parametrize("spikes", ["warn", "skip"])
def test_a_skipped_spike_leaves_no_trace(tmp_path, spikes, optim, world):
    job = job_of(tmp_path, spikes, world(torch.device("cpu"), Launch("none")), optim=optim)
    training = start_training(job)
    for step in range(1, STEPS):
        before = [tensor.clone() for tensor in tensors_of(training)]
        train_step(job, training)
        after = tensors_of(training)
        is_same = len(before) == len(after) and all(map(torch.equal, before, after))
        assert is_same == (spikes == "skip" and step == BAD)
    assert len(warned(job)) == 1
    assert ("the step is skipped on all ranks" in warned(job)[0]) == (spikes == "skip")


def tensors_of(training):
    state = training.optimizer.state_dict()["state"]
    return [
        *(tensor.detach() for tensor in training.model.state_dict().values()),
        *(torch.as_tensor(value) for entry in state.values() for value in entry.values() if value is not None),
    ]


def test_a_skip_is_counted_and_does_not_count_as_not_finite(tmp_path):
    job = job_of(tmp_path, "skip")
    fit(job)
    (skipped,) = [(step, line["train/skipped_steps"]) for step, line in job.log.lines if "train/skipped_steps" in line]
    assert skipped == (50, 1)
    assert not any("not finite" in line for line in job.log.said)


def test_a_spike_may_stop_the_run(tmp_path):
    job = job_of(tmp_path, "stop")
    with pytest.raises(DivergedError, match=r"step 50: a spike: the gradient norm .* left as they were") as caught:
        fit(job)
    assert "--health.spikes skip" in str(caught.value)
    assert max(job.run.checkpoints.by_step()) == 40
    again = job_of(tmp_path, "skip")  # which may change
    fit(again)
    assert len(warned(again)) >= 1
    assert max(again.run.checkpoints.by_step()) == 60


def test_a_loss_alone_may_stop_the_run(tmp_path):
    """The gradient is clipped by nobody and the weights do not move: the loss is large by a constant."""
    job = job_of(tmp_path, "stop", bad=())
    training = start_training(job)
    component = training.component(Spikes)
    for line in range(LEAST_LOSSES):
        component._judge_loss(2.0 + 0.01 * line, line)
    with pytest.raises(DivergedError, match=r"step 99: a spike: the mean loss since the last line is 4, the usual"):
        component._judge_loss(4.0, 99)


def test_what_stays_is_no_spike(tmp_path):
    """Another level is said once, and learned: steps are not skipped for ever."""
    job = job_of(tmp_path, "skip", bad=range(40, STEPS + 1), times=30.0)
    fit(job)
    skipped = [line for line in warned(job) if "skipped on all ranks" in line]
    assert len(skipped) == IN_A_ROW - 1
    assert len([line for line in warned(job) if f"above its limit for {IN_A_ROW} steps" in line]) == 1


def test_a_run_that_goes_on_decides_alike(tmp_path):
    """Of a run that was stopped just before the spike, what is usual is in the checkpoint, to the last bit."""
    whole = job_of(tmp_path / "whole", "skip")
    fit(whole)
    fit(job_of(tmp_path / "parts", "skip", steps=40))
    parts = job_of(tmp_path / "parts", "skip")
    fit(parts)
    assert warned(parts) == warned(whole) != []
    ends = [training_state(job, start_training(job))["components"]["spikes"] for job in (whole, parts)]
    assert ends[0] == ends[1]
    assert ends[0]["norms"]["count"] == STEPS


def test_ranks_decide_alike_and_as_one_does(tmp_path):
    def work(world):
        job = job_of(tmp_path / "two", "skip", world)
        training = start_training(job)
        for _ in range(STEPS - 1):
            train_step(job, training)
        return warned(job), [tensor.clone() for tensor in training.model.state_dict().values()]

    (one, weights), (other, same) = run_ranks(2, work)
    assert one == other != []
    assert all(map(torch.equal, weights, same))
    alone = job_of(tmp_path / "one", "skip")
    training = start_training(alone)
    for _ in range(STEPS - 1):
        train_step(alone, training)
    assert [line.split("(")[0] for line in warned(alone)] == [line.split("(")[0] for line in one]
    torch.testing.assert_close(list(training.model.state_dict().values()), weights)


def test_ranks_that_train_apart_have_no_common_norm():
    config = Config(comm=CommConfig(sync="local"), health=HealthConfig(spikes="skip"))
    with pytest.raises(ConfigError, match=r"--health\.spikes skip needs what all ranks share"):
        strategy_of(config, 2)


def curves(seed, steps=3000):
    """Make up the gradient norms and losses of a healthy run: they fall, rise late, and some have heavy tails."""
    draw = random.Random(seed)
    tail, late = draw.choice((0.1, 0.3, 0.8)), draw.choice((0.0, 1.0))
    for step in range(steps):
        share = step / steps
        norm = (1 + 9 * math.exp(-40 * share)) * math.exp(late * share) * math.exp(tail * draw.gauss(0, 1))
        if tail == 0.8 and draw.random() < 0.02:
            norm *= 3
        loss = (0.02 if tail == 0.8 else 2.5) + 5 * math.exp(-20 * share)
        yield norm, loss * math.exp(tail / 5 * draw.gauss(0, 1))


def alarms(pairs, lines=10):
    """Return the steps whose norm, and the lines whose loss, would be a spike."""
    norms = RunningScale(NORMS, LEAST_NORMS, DEVIATIONS, EVERY)
    losses = RunningScale(LOSSES, LEAST_LOSSES, DEVIATIONS)
    found, window = [], []
    for step, (norm, loss) in enumerate(pairs, 1):
        if math.log(norm) > norms.limit(math.log(NORM_FACTOR)):
            found.append(("norm", step))
        norms.add(math.log(norm))
        window.append(loss)
        if len(window) == lines:
            mean = math.log(sum(window) / lines)
            if mean > losses.limit(math.log(LOSS_FACTOR)):
                found.append(("loss", step))
            losses.add(mean)
            window = []
    return found


def test_20_healthy_runs_raise_no_alarm():
    assert [alarms(curves(seed)) for seed in range(20)] == [[]] * 20


@pytest.mark.parametrize("at", [200, 1500, 2900])
def test_a_spike_in_a_run_is_found(at):
    """Also where it is late: one norm of ten times the usual, ten losses of twice the usual."""
    pairs = [(1 + 0.1 * math.sin(step), 3 + 0.05 * math.cos(step)) for step in range(3000)]
    pairs[at - 1] = (10.0, 3.0)
    pairs[at : at + 10] = [(1.0, 6.0)] * 10
    assert alarms(pairs) == [("norm", at), ("loss", at + 10)]


def test_the_highest_norm_of_real_healthy_runs_is_no_spike():
    pairs = [(1 + 0.1 * math.sin(step), 3 + 0.05 * math.cos(step)) for step in range(300)]
    pairs[200] = (6.6, 3.0)
    assert alarms(pairs) == []


def test_a_healthy_run_says_nothing(tmp_path):
    for seed in range(5):
        job = job_of(tmp_path / str(seed), "stop", bad=(), seed=seed, every=1)
        fit(job)
        assert warned(job) == []


def test_what_is_usual_goes_through_its_state():
    draw = random.Random(0)
    scale, other = RunningScale(8, 4, 5.0, 3), RunningScale(8, 4, 5.0, 3)
    for _ in range(10):
        scale.add(draw.random())
    other.load(**scale.state())
    for _ in range(5):
        value = draw.random()
        scale.add(value)
        other.add(value)
        assert scale.limit(0.1) == other.limit(0.1) < math.inf
    scale.forget()
    assert scale.limit(0.1) == math.inf
