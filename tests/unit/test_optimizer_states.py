"""States of optimizers of any form: undivided, sharded on ranks that train apart, and loaded as each other."""

import copy
import dataclasses

import pytest
import torch
from thread_world import run_ranks
from torch import nn

from hvdtrain.data.dataset import TensorSamples
from hvdtrain.optim.adamw import AdamWConfig
from hvdtrain.rundir.directory import RunDirectory
from hvdtrain.rundir.log import MetricLog
from hvdtrain.settings import CommConfig, Config, TrainConfig
from hvdtrain.trainer import Task, settle, train_step
from hvdtrain.trainer.memory import optimizer_bytes
from hvdtrain.trainer.saver import Saver
from hvdtrain.trainer.state import replicated_tensors, start_training
from hvdtrain.trainer.strategy import optimizer_tensors

STEPS, SAVED = 5, 3
KINDS = {}


def kind(one):
    """Make an optimizer's class of the function that moves one parameter: `(gradient, parameter's state)` to a move."""

    class Kind(torch.optim.Optimizer):
        def __init__(self, params, lr):
            super().__init__(params, {"lr": lr})

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.sub_(one(p.grad, self.state[p]), alpha=group["lr"])

    KINDS[one.__name__] = Kind
    return one


@kind
def in_a_tuple(gradient, state):
    m, v = state.get("pair", (torch.zeros_like(gradient),) * 2)
    state["pair"] = m, v = m * 0.9 + gradient, v * 0.9 + gradient.square()
    return m / (v.sqrt() + 1e-8)


@kind
def in_a_list_that_grows(gradient, state):
    last = state.setdefault("last", [])
    last.append(gradient.clone())
    del last[:-3]
    return sum(last)


@kind
def in_a_dictionary(gradient, state):
    return state.setdefault("of", {"m": torch.zeros_like(gradient)})["m"].mul_(0.5).add_(gradient)


@kind
def in_a_tuple_of_another_type(gradient, state):
    (m,) = state.get("m", (torch.zeros_like(gradient, dtype=torch.bfloat16),))
    state["m"] = (m.mul(0.5).add_(gradient.bfloat16()),)
    return state["m"][0].to(gradient.dtype)


@kind
def stacked(gradient, state):
    last = state.setdefault("last", torch.zeros(2, *gradient.shape, dtype=gradient.dtype))
    last[state.setdefault("count", 0) % 2] = gradient
    state["count"] += 1
    return last.mean(0)


@kind
def flat(gradient, state):
    m = state.setdefault("m", torch.zeros(gradient.numel(), dtype=gradient.dtype))
    return m.mul_(0.5).add_(gradient.reshape(-1)).view(gradient.shape)


@kind
def of_one_number(gradient, state):
    return gradient / float(state.setdefault("count", torch.zeros(1)).add_(1))


@kind
def of_bits(gradient, state):
    last, state["sign"] = state.get("sign", gradient > 0), gradient > 0
    return gradient * (last == state["sign"])


@kind
def twice_the_same(gradient, state):
    state["b"] = state.setdefault("a", torch.zeros_like(gradient))
    return state["a"].mul_(0.5).add_(gradient) + state["b"]


@kind
def factored_where_both_sides_are_long(gradient, state):
    """As Adafactor of other libraries."""
    if gradient.dim() == 2 and min(gradient.shape) >= 128:
        rows = state.setdefault("rows", gradient.new_zeros(gradient.shape[0])).add_(gradient.square().mean(1))
        columns = state.setdefault("columns", gradient.new_zeros(gradient.shape[1])).add_(gradient.square().mean(0))
        return 0.01 * gradient / (rows[:, None] * columns / rows.mean()).sqrt().add_(1e-3)
    return 0.01 * gradient / state.setdefault("v", torch.zeros_like(gradient)).add_(gradient.square()).sqrt().add_(1e-3)


class Counting(torch.optim.Optimizer):
    """Counts for all parameters together, under a name."""

    count = 0

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        self.state["count"] = self.state.get("count", self.count) + 1
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad / float(self.state["count"]), alpha=group["lr"])


class CountingInATensor(Counting):
    count = torch.zeros(())


KINDS |= {"of_a_name": Counting, "tensor_of_a_name": CountingInATensor}

torch.manual_seed(0)
MODEL = nn.Sequential(nn.Linear(3, 130), nn.Tanh(), nn.Linear(130, 131), nn.Tanh(), nn.Linear(131, 1))
WAYS = {"plain": {}, "shard": {"shard": True}, "local": {"sync": "local", "period": 2}}


def job_of(world, folder, name, shard=False, **comm):
    x = torch.randn(26, 3, generator=torch.Generator().manual_seed(3)).double()
    data = TensorSamples(x, x.sin().sum(1, keepdim=True))
    config = Config(
        train=TrainConfig(steps=STEPS, global_batch_size=12, precision="fp64"),
        optim=AdamWConfig(peak_lr=0.02, schedule="constant", shard=shard),
        comm=CommConfig(**comm),
    )
    task = Task(
        model=copy.deepcopy(MODEL),
        train_data=data,
        val_data=data,
        loss_sums=lambda model, batch: {"loss": (model(batch[0]) - batch[1]).square().sum()},
        build_optimizer=lambda optim, model: KINDS[name](model.parameters(), lr=optim.peak_lr),
    )
    job = settle(task, config, world, RunDirectory(folder), MetricLog(None, []))
    return dataclasses.replace(job, allowed_changes=("comm", "optim"))


def trained(world, folder, name, way, steps=STEPS, save=False):
    job = job_of(world, folder, name, **WAYS[way])
    training = start_training(job)
    while training.step < steps:
        train_step(job, training)
    if save:
        with Saver(job) as saver:
            saver.save(training, {})
            saver.finish()
    return {key: parameter.detach().clone() for key, parameter in training.model.named_parameters()}


def gap(one, other):
    return max((one[name] - other[name]).abs().max().item() for name in one)


@pytest.mark.parametrize("name", KINDS)
def test_any_form_of_state_goes_on_whole_divided_and_on_other_numbers_of_ranks(tmp_path, name):
    """Ranks that train apart are compared with themselves: theirs is another training."""
    (alone,) = run_ranks(1, lambda world: trained(world, tmp_path / "alone", name, "plain"))
    for way in WAYS:
        whole = run_ranks(2, lambda world, way=way: trained(world, tmp_path / f"{way}-whole", name, way))
        run_ranks(2, lambda world, way=way: trained(world, tmp_path / way, name, way, SAVED, save=True))
        again = run_ranks(2, lambda world, way=way: trained(world, tmp_path / way, name, way))
        assert [gap(*pair) for pair in zip(whole, again, strict=True)] == [0.0, 0.0], way
        if way == "local":
            run_ranks(3, lambda world, way=way: trained(world, tmp_path / way, name, way))
            continue
        assert max(gap(alone, own) for own in whole) < 1e-12, way
        for size, other in ((3, way), (1, way), (2, "shard" if way == "plain" else "plain")):
            found = run_ranks(size, lambda world, way=way, other=other: trained(world, tmp_path / way, name, other))
            assert max(gap(alone, own) for own in found) < 1e-12, (way, size, other)


@pytest.mark.parametrize("name", KINDS)
def test_any_form_of_state_is_compared_between_ranks_and_counted(tmp_path, name):
    def work(world):
        job = job_of(world, tmp_path, name)
        training = start_training(job)
        train_step(job, training)
        found = optimizer_tensors(training)
        assert found.items() <= replicated_tensors(training).items()
        counted = optimizer_bytes(job, training.model)
        has_own = any(tensor.dim() for tensor in found.values())
        return {key for key, tensor in found.items() if tensor.dim()}, bool(sum(counted.values())) == has_own

    (compared, is_counted), other = run_ranks(2, work)
    assert other == (compared, is_counted)
    assert is_counted
    has_tensors = name not in ("of_a_name", "tensor_of_a_name")
    assert bool(compared) == has_tensors
