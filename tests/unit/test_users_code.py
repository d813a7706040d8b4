"""What a user's code hands over: modes, state dictionaries, numbers of numpy, data without targets, lone samples."""

import dataclasses

import numpy as np
import pytest
import torch
from test_components import SOLO, Lines, StoppedError, job_of, list_checkpoints
from torch import nn

from hvdtrain.data.dataset import TensorSamples
from hvdtrain.errors import ConfigError
from hvdtrain.rundir.checkpoint import load_checkpoint
from hvdtrain.rundir.directory import RunDirectory
from hvdtrain.rundir.log import MetricLog
from hvdtrain.settings import CheckpointConfig, Config, EvalConfig, HealthConfig, OptimConfig, TrainConfig
from hvdtrain.trainer import Evaluation, Task, evaluate, fit, settle, train_step
from hvdtrain.trainer.component import Component
from hvdtrain.trainer.lone_samples import check_lone_samples
from hvdtrain.trainer.state import start_training
from hvdtrain.trainer.values import as_figure, as_sum, count_targets, storable


def with_model(job, model):
    return dataclasses.replace(job, task=dataclasses.replace(job.task, model=model))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))


def modes(model):
    return [module.training for module in model.modules()]


# Modes


def test_a_model_built_in_eval_mode_is_trained_in_training_mode(tmp_path):
    log = Lines()
    job = with_model(job_of(tmp_path, log, steps=2), network().eval())
    training = start_training(job)
    assert all(modes(training.model))
    fit(with_model(job_of(tmp_path, log, steps=2), network().eval()))
    assert any("built in eval mode" in line for line in log.said)


def test_what_is_frozen_stays_frozen_after_an_evaluation_and_on_resume(tmp_path):
    def build():
        model = network()
        model[1].eval()
        return model

    whole, halves = build(), build()
    fit(with_model(job_of(tmp_path / "whole"), whole))
    assert modes(whole) == modes(build())
    assert whole[1].num_batches_tracked == 0  # its statistics are frozen, too
    with pytest.raises(StoppedError):
        fit(with_model(job_of(tmp_path / "halves", Lines(stop_at=9)), build()))
    fit(with_model(job_of(tmp_path / "halves"), halves))
    assert all(a.equal(b) for a, b in zip(whole.state_dict().values(), halves.state_dict().values(), strict=True))


def test_modes_that_change_while_training_are_in_the_checkpoint(tmp_path):
    class Freeze(Component):
        name = "freeze"

        def __init__(self, job):
            pass

        def after_update(self, training, step):
            if step.number == 3:
                training.model[1].eval()

    job = with_model(job_of(tmp_path), network())
    job = dataclasses.replace(job, task=dataclasses.replace(job.task, components=(Freeze,)))
    fit(job)
    resumed = start_training(with_model(job_of(tmp_path), network()))
    assert not resumed.model[1].training
    assert resumed.model[2].training


# state_dict()


class Renaming(nn.Module):
    """Saves its weight under another name, and loads it under that."""

    def __init__(self, is_lossy=False):
        super().__init__()
        self.linear = nn.Linear(5, 1)
        self.seen = 0
        self.register_state_dict_post_hook(self._rename)
        if not is_lossy:
            self.register_load_state_dict_pre_hook(self._back)

    @staticmethod
    def _rename(module, state, prefix, metadata):
        state[prefix + "kernel"] = state.pop(prefix + "linear.weight")

    @staticmethod
    def _back(module, state, prefix, *rest):
        state[prefix + "linear.weight"] = state.pop(prefix + "kernel")

    def forward(self, x):
        return self.linear(x)


class Counting(nn.Linear):
    """Has extra state."""

    def __init__(self, value=0):
        super().__init__(5, 1)
        self.seen = value

    def forward(self, x):
        self.seen += self.training
        return super().forward(x)

    def get_extra_state(self):
        return {"seen": self.seen}

    def set_extra_state(self, state):
        self.seen = state["seen"]


@pytest.mark.parametrize("build", [Renaming, Counting])
def test_what_state_dict_says_is_saved_and_loaded(tmp_path, build):
    model = build()
    fit(with_model(job_of(tmp_path), model))
    resumed = start_training(with_model(job_of(tmp_path), build()))
    assert resumed.step == 12
    assert resumed.model.state_dict().keys() == model.state_dict().keys()
    assert all(a.equal(b) for a, b in zip(resumed.model.parameters(), model.parameters(), strict=True))
    assert resumed.model.seen == model.seen
    saved = load_checkpoint(list_checkpoints(tmp_path)[-1])
    assert saved.weights.keys() == {k for k, v in model.state_dict().items() if torch.is_tensor(v)}


def test_hooks_that_cannot_be_loaded_back_are_refused_before_the_first_step(tmp_path):
    with pytest.raises(ConfigError, match="could not be resumed"):
        fit(with_model(job_of(tmp_path), Renaming(is_lossy=True)))


def test_extra_state_that_a_checkpoint_cannot_hold_is_refused(tmp_path):
    class Odd(Counting):
        def get_extra_state(self):
            return {"seen": np.zeros(3)}

    with pytest.raises(ConfigError, match=r"state_dict\(\)\['_extra_state'\]\['seen'\] is of type ndarray"):
        fit(with_model(job_of(tmp_path), Odd()))


def test_an_average_of_renamed_weights_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"--train\.ema"):
        start_training(with_model(job_of(tmp_path, ema=0.9), Renaming()))


# Numbers


class NumpyCounts(TensorSamples):
    def num_targets(self, indices):
        return np.int64(len(indices))


def test_numbers_of_numpy_do_not_spoil_a_checkpoint(tmp_path):
    job = job_of(tmp_path)
    data = NumpyCounts(*job.task.train_data.tensors)

    def build_optimizer(optim, model):
        return torch.optim.SGD(model.parameters(), lr=np.float64(optim.peak_lr), weight_decay=np.float32(0.01))

    def summarize(means):
        return {**means, "half": np.float32(means["loss"] / 2), "tensor": torch.tensor(1.5)}

    task = dataclasses.replace(
        job.task, train_data=data, val_data=data, build_optimizer=build_optimizer, summarize=summarize
    )
    metrics = fit(dataclasses.replace(job, task=task))
    assert all(type(value) is float for value in metrics.values())
    state = load_checkpoint(list_checkpoints(tmp_path)[-1]).state
    assert type(state["optimizer"]["param_groups"][0]["weight_decay"]) is float


@pytest.mark.parametrize("count", [np.int32(3), 3, 3.0, np.float64(3), torch.tensor(3), np.array(3)])
def test_counts_of_any_kind(count):
    class Data(TensorSamples):
        def num_targets(self, indices):
            return count

    number = count_targets(Data(torch.zeros(4)), torch.arange(2))
    assert (number, type(number)) == (3, int)


@pytest.mark.parametrize("count", [2.5, -1, None, "3", float("nan"), torch.ones(2), True])
def test_counts_that_are_none(count):
    class Data(TensorSamples):
        def num_targets(self, indices):
            return count

    with pytest.raises(ConfigError, match=r"num_targets\(\) of Data returned"):
        count_targets(Data(torch.zeros(4)), torch.arange(2))


def test_sums_and_figures():
    cpu = torch.device("cpu")
    for value in (2, 2.0, np.float32(2), np.array(2), torch.tensor([2])):
        assert as_sum(value, "x", cpu).item() == as_figure(value, "x") == 2
    with pytest.raises(ConfigError, match="'x'"):
        as_sum(torch.ones(2), "x", cpu)
    with pytest.raises(ConfigError, match="'x'"):
        as_sum("two", "x", cpu)
    with pytest.raises(ConfigError, match="'x'"):
        as_figure(torch.ones(2), "x")
    with pytest.raises(ConfigError, match=r"state\['a'\]\[1\] is of type set"):
        storable({"a": [1, {2}]}, "state")


# Held-out sets


def other(job, name="", metrics=("loss",)):
    return Evaluation(name=name, data=job.task.train_data, loss_sums=job.task.loss_sums, metrics=metrics)


def test_held_out_sets_have_names(tmp_path):
    job = job_of(tmp_path)
    task = dataclasses.replace(job.task, evaluations=(other(job, "books"), other(job, "code")))
    metrics = fit(dataclasses.replace(job, task=task))
    assert metrics.keys() == {"val/loss", "val/books/loss", "val/code/loss"}
    assert metrics["val/books/loss"] == metrics["val/code/loss"] != metrics["val/loss"]
    assert load_checkpoint(list_checkpoints(tmp_path)[-1]).manifest.val_loss == metrics["val/loss"]


def test_sets_without_names_do_not_replace_each_other(tmp_path):
    job = job_of(tmp_path)
    task = dataclasses.replace(job.task, evaluations=(other(job),))
    with pytest.raises(ConfigError, match="two evaluations report val/loss"):
        settle(task, job.config, SOLO, RunDirectory(tmp_path), MetricLog(None, []))


# Nothing to take a mean of


class NoTargets(TensorSamples):
    def num_targets(self, indices):
        return 0


def test_a_step_without_targets_is_a_step_of_zeros(tmp_path):
    job = job_of(tmp_path)

    def loss(model, batch):
        return {"loss": (model(batch[0]) * 0).sum()}

    task = dataclasses.replace(job.task, train_data=NoTargets(*job.task.train_data.tensors), loss_sums=loss)
    optim = OptimConfig(name="sgd", peak_lr=0.1, weight_decay=0.0)
    job = dataclasses.replace(job, task=task, config=dataclasses.replace(job.config, optim=optim))
    training = start_training(job)
    before = [p.clone() for p in training.model.parameters()]
    train_step(job, training)
    assert all(p.grad.eq(0).all() for p in training.model.parameters())
    assert all(a.equal(b) for a, b in zip(before, training.model.parameters(), strict=True))
    assert training.step == 1


def test_an_evaluation_without_targets_says_so_and_is_never_the_best(tmp_path):
    log = Lines()
    job = job_of(tmp_path, log)
    task = dataclasses.replace(job.task, val_data=NoTargets(*job.task.val_data.tensors))
    metrics = fit(dataclasses.replace(job, task=task))
    assert np.isnan(metrics["val/loss"])
    assert any("has no targets" in line for line in log.said)
    assert not (tmp_path / "checkpoints" / "best").exists()


def test_an_evaluation_that_raises_does_not_cost_the_training(tmp_path):
    class Bad(TensorSamples):
        reads_ahead = False
        is_bad = True

        def batch(self, indices):
            if self.is_bad and len(indices) > 1:  # when training starts, single samples are looked at
                raise OSError("cannot be read")
            return super().batch(indices)

    job = job_of(tmp_path)
    config = dataclasses.replace(job.config, eval=EvalConfig(), checkpoint=CheckpointConfig())
    bad = Bad(*job.task.val_data.tensors)
    job = dataclasses.replace(job, config=config, task=dataclasses.replace(job.task, val_data=bad))
    with pytest.raises(OSError, match="cannot be read"):
        fit(job)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000012"]
    bad.is_bad = False
    again = with_model(job, job_of(tmp_path).task.model)
    training = start_training(again)
    assert (training.step, training.is_evaluation_due) == (12, True)
    assert fit(again)["val/loss"] > 0
    assert load_checkpoint(list_checkpoints(tmp_path)[-1]).manifest.val_loss > 0


# A lone sample


def lone(tmp_path, model, num_samples=9, shape=(5,), **train):
    x = torch.randn(num_samples, *shape)
    data = TensorSamples(x, x.flatten(1).sum(1, keepdim=True))

    def loss(model, batch):
        return {"loss": (model(batch[0]).flatten(1).mean(1, keepdim=True) - batch[1]).square().sum()}

    task = Task(model=model, train_data=data, val_data=data, loss_sums=loss)
    config = Config(
        train=TrainConfig(**{"steps": 5, "global_batch_size": 4, **train}), health=HealthConfig(memory_check=False)
    )
    return settle(task, config, SOLO, RunDirectory(tmp_path), MetricLog(None, []))


def test_a_lone_sample_before_batch_norm_is_refused_before_the_first_step(tmp_path):
    with pytest.raises(ConfigError, match="cannot train on a micro-batch of one sample"):
        fit(lone(tmp_path, network()))
    assert list_checkpoints(tmp_path) == []


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        (network, {"num_samples": 10}),
        (lambda: nn.Linear(5, 1), {}),
        (lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)), {"shape": (1, 5, 5)}),
    ],
    ids=["nobody is alone", "no batch norm", "images"],
)
def test_what_a_lone_sample_does_not_hurt(tmp_path, model, settings):
    model = model()
    before = [buffer.clone() for buffer in model.buffers()]
    job = lone(tmp_path, model, **settings)
    training = start_training(job)
    check_lone_samples(job, training)
    assert all(a.equal(b) for a, b in zip(before, training.model.buffers(), strict=True))
    fit(job)


def test_evaluations_draw_the_same_every_time(tmp_path):
    job = job_of(tmp_path)

    def noisy(model, batch):
        return {"loss": (model(batch[0]) + torch.randn_like(batch[1]) - batch[1]).square().sum()}

    job = dataclasses.replace(job, task=dataclasses.replace(job.task, loss_sums=noisy))
    training = start_training(job)
    first = evaluate(job, training)
    torch.rand(17)
    assert evaluate(job, training) == first
    small = dataclasses.replace(job, config=dataclasses.replace(job.config, eval=EvalConfig(batch_size=1)))
    assert evaluate(small, training)["val/loss"] == pytest.approx(first["val/loss"], rel=1e-5)
