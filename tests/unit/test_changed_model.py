"""Code of a user's that makes the model, or the optimizer's groups, others in the midst of a run: it is said."""

import pytest
import torch
from test_callbacks import job_of
from test_components import Lines
from thread_world import run_ranks
from torch import nn

import hvdtrain
from hvdtrain.errors import ConfigError
from hvdtrain.trainer import fit


class AtStep4(hvdtrain.Callback):
    """Does something after the fourth step."""

    def __init__(self, change):
        self.change = change

    def after_step(self, run):
        if run.step == 4:
            self.change(run)


def said(folder, change, **more):
    log = Lines()
    fit(job_of(folder, [AtStep4(change)], log=log, **more))
    return [line for line in log.said if line.startswith("WARNING")]


def new_head(run):
    torch.manual_seed(0)
    run.model[2] = nn.Linear(8, 1)


def another_group(run):
    group = run.optimizer.param_groups[0]
    half = [group["params"].pop()]
    run.optimizer.add_param_group({**group, "params": half, "weight_decay": 0.3})


def another_layer(run):
    run.model.append(nn.Linear(1, 1))
    run.optimizer.add_param_group({"params": list(run.model[3].parameters())})


def a_bias_less(run):
    run.model[0].bias = None


def lost(run):
    run.optimizer.param_groups[0]["params"].pop()


def frozen(run):
    run.model[0].requires_grad_(False)


def reset(run):
    torch.manual_seed(0)
    run.model[2].reset_parameters()
    run.model[0].weight.data = run.model[0].weight.data.clone()


def test_a_layer_that_takes_anothers_place_is_not_trained_and_that_is_said_once(tmp_path):
    (line,) = said(tmp_path, new_head)
    assert line.startswith("WARNING: 2.weight, 2.bias of the model became another parameter while it was trained")
    assert "it is not trained" in line


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (another_group, "the optimizer's parameter groups"),
        (another_layer, "3.bias, 3.weight of the model and the optimizer's parameter groups"),
        (a_bias_less, "0.bias of the model"),
    ],
)
def test_what_a_run_that_goes_on_would_not_have_is_said_once(tmp_path, change, what):
    (line,) = said(tmp_path, change)
    assert line.startswith(f"WARNING: other than at the start: {what}. A run could not go on")


def test_a_parameter_that_is_taken_out_of_the_groups_ends_the_run_in_a_sentence(tmp_path):
    with pytest.raises(ConfigError, match=r"1 of the optimizer's parameters, .* \(1, 8\), were taken out of"):
        said(tmp_path, lost)


@pytest.mark.parametrize("change", [frozen, reset])
def test_nothing_is_said_of_what_stays(tmp_path, change):
    assert said(tmp_path, change) == []


def test_ranks_that_share_the_state_know_what_the_optimizer_has(tmp_path):
    """Its groups hold pieces then, which are none of the model's parameters."""

    def work(world):
        log = Lines()
        shard = hvdtrain.OptimConfig(peak_lr=0.05, schedule="constant", shard=True)
        job = job_of(tmp_path, [AtStep4(frozen)], world=world, log=log, optim=shard)
        fit(job)
        return [line for line in log.said if line.startswith("WARNING")]

    assert run_ranks(2, work) == [[], []]
