"""Learning rates of groups: what the optimizer was built with is heard, or refused; what a callback sets is told."""

import dataclasses

import pytest
import torch
from test_components import Lines, job_of

from hvdtrain.errors import ConfigError
from hvdtrain.settings import OptimConfig
from hvdtrain.trainer import fit, train_step
from hvdtrain.trainer.state import start_training

PEAK = 0.05


def job_with(folder, build, log=None, **task):
    job = job_of(folder, log)
    optim = OptimConfig(peak_lr=PEAK, schedule="constant", warmup_steps=0)
    task = dataclasses.replace(job.task, build_optimizer=build, **task)
    return dataclasses.replace(job, task=task, config=dataclasses.replace(job.config, optim=optim))


def groups(*rates, default=PEAK, kind=torch.optim.SGD):
    def build(optim, model):
        parts = [{"params": layer.parameters()} for layer in (model[0], model[3])]
        own = [{**part, **({} if rate is None else {"lr": rate})} for part, rate in zip(parts, rates, strict=True)]
        return kind(own, **({} if default is None else {"lr": default}))

    return build


def test_groups_keep_their_share_of_the_peak(tmp_path):
    job = job_with(tmp_path, groups(0.1 * PEAK, None), log := Lines())
    training = start_training(job)
    before = [model.weight.clone() for model in (training.model[0], training.model[3])]
    train_step(job, training)
    assert [group["lr"] for group in training.optimizer.param_groups] == [pytest.approx(0.005), PEAK]
    assert not before[0].equal(training.model[0].weight)
    fit(job)
    assert any("groups learn at 0.1, 1 times the learning rate" in line for line in log.said)
    assert log.lines[-2][1]["train/lr"] == PEAK


def test_a_group_that_is_added_later_keeps_its_share(tmp_path):
    class Adds:
        def after_step(self, run):
            if run.step == 2:
                run.optimizer.add_param_group({"params": run.model[3].parameters(), "lr": 0.2 * PEAK})

    job = job_with(tmp_path, lambda optim, model: torch.optim.SGD(model[0].parameters(), lr=PEAK), callbacks=[Adds()])
    training = start_training(job)
    for _ in range(4):
        train_step(job, training)
    assert [group["lr"] for group in training.optimizer.param_groups] == [PEAK, pytest.approx(0.01)]


@pytest.mark.parametrize(
    "build",
    [
        groups(None, None),
        groups(None, None, default=None),
        groups(None, None, default=None, kind=torch.optim.Adam),
        groups(PEAK, PEAK, default=7.0),
    ],
)
def test_nobody_is_told_what_changes_nothing(tmp_path, build):
    training = start_training(job_with(tmp_path, build))
    assert training.rates.about == ""


@pytest.mark.parametrize("rates", [(0.3, 0.3), (0.3, 0.03), (None, None)])
def test_a_rate_that_nothing_would_use_is_refused(tmp_path, rates):
    with pytest.raises(ConfigError, match=r"Write lr=optim\.peak_lr"):
        start_training(job_with(tmp_path, groups(*rates, default=0.3)))


def test_a_rate_that_a_callback_sets_is_told_once(tmp_path):
    class Halves:
        def after_step(self, run):
            for group in run.optimizer.param_groups:
                group["lr"] *= 0.5

    log = Lines()
    fit(job_with(tmp_path, groups(None, None), log, callbacks=[Halves()]))
    assert sum("was changed from 0.05 to 0.025" in line for line in log.said) == 1


def test_an_optimizer_that_computes_the_loss_itself_is_refused(tmp_path):
    def build(optim, model):
        return torch.optim.LBFGS(model.parameters(), lr=PEAK)

    with pytest.raises(ConfigError, match="LBFGS, whose step"):
        start_training(job_with(tmp_path, build))
