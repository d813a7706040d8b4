"""Settings of the optimizer that are allowed to change when a run goes on do change; what code has set stays."""

import dataclasses

import pytest
import torch
from test_components import SOLO, Lines
from thread_world import run_ranks
from torch import nn

import hvdtrain
from hvdtrain.data.dataset import TensorSamples
from hvdtrain.errors import ResumeError
from hvdtrain.optim.adamw import AdamWConfig
from hvdtrain.optim.sgd import SgdConfig
from hvdtrain.rundir.directory import RunDirectory
from hvdtrain.settings import CommConfig, Config, TrainConfig
from hvdtrain.trainer import Task, fit, settle

PLAIN = AdamWConfig(peak_lr=0.05, schedule="constant", weight_decay=0.1)
CHANGES = {
    "weight_decay": (0.0, {"weight_decay": 0.0}),
    "beta1": (0.5, {"betas": (0.5, 0.95)}),
    "eps": (1e-2, {"eps": 1e-2}),
    "kernel": ("loop", {"fused": False, "foreach": False}),
}


class Options(hvdtrain.Callback):
    """Keeps the options of the first group, and may set some."""

    def __init__(self, **own):
        self.own, self.seen = own, {}

    def after_step(self, run):
        if run.step == 2:
            run.optimizer.param_groups[0].update(self.own)
        self.seen = {name: value for name, value in run.optimizer.param_groups[0].items() if name != "params"}


def trained(folder, optim, steps, callback, world=SOLO, allowed=("optim",), **sections):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(12, 5, generator=generator)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    data = TensorSamples(x, x.sin().sum(1, keepdim=True))

    def loss(model, batch):
        return {"loss": (model(batch[0]) - batch[1]).square().sum()}

    task = Task(model=model, train_data=data, val_data=data, loss_sums=loss, callbacks=[callback])
    config = Config(train=TrainConfig(steps=steps, global_batch_size=4), optim=optim, **sections)
    job = settle(task, config, world, RunDirectory(folder), Lines(), allowed)
    fit(job)
    return callback.seen


@pytest.mark.parametrize("name", CHANGES)
def test_what_a_setting_makes_of_the_groups_is_as_it_says_and_not_as_it_was_saved(tmp_path, name):
    value, options = CHANGES[name]
    before = trained(tmp_path, PLAIN, 4, Options())
    assert not options.items() <= before.items()
    after = trained(tmp_path, dataclasses.replace(PLAIN, **{name: value}), 6, Options())
    assert options.items() <= after.items()
    assert {key: value for key, value in after.items() if key not in options} == {
        key: value for key, value in before.items() if key not in options
    }


@pytest.mark.parametrize(
    "sections", [{}, {"comm": CommConfig(sync="local", period=3)}, {"shard": True}], ids=["each step", "local", "shard"]
)
def test_on_ranks(tmp_path, sections):
    optim = dataclasses.replace(PLAIN, shard=sections.pop("shard", False))
    changed = dataclasses.replace(optim, beta1=0.5)
    run_ranks(2, lambda world: trained(tmp_path, optim, 4, Options(), world, **sections))
    for seen in run_ranks(2, lambda world: trained(tmp_path, changed, 6, Options(), world, **sections)):
        assert seen["betas"] == (0.5, 0.95)


def test_what_code_of_the_users_has_set_goes_on(tmp_path):
    trained(tmp_path, PLAIN, 4, Options(weight_decay=0.3, eps=1e-3))
    seen = trained(tmp_path, dataclasses.replace(PLAIN, eps=1e-2), 6, Options())
    assert (seen["weight_decay"], seen["eps"]) == (0.3, 1e-2)


def test_another_optimizer_is_refused_though_it_was_allowed(tmp_path):
    trained(tmp_path, PLAIN, 4, Options())
    with pytest.raises(ResumeError, match=r"optim.name was adamw and is sgd now\. What one remembers"):
        trained(tmp_path, SgdConfig(peak_lr=0.05, schedule="constant"), 6, Options())
