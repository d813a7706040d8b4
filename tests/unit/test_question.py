"""A question that travels with the gradients: one yes is heard by all ranks, and costs no collective of its own."""

import pytest
import torch
from thread_world import run_ranks
from torch import nn

from hvdtrain.process.launch import Launch
from hvdtrain.world import SoloWorld, ask_with_gradients

# Who says yes in each step.
YES = [(), (0,), (1,), (), (0, 1)]


def answers(world, used=(0, 1, 2), **averaging):
    """Return what this rank hears in each step, its gradients, and the names of its collectives."""
    model = nn.ParameterList([nn.Parameter(torch.ones(3, dtype=torch.float32)) for _ in range(3)])
    optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.0), model, **averaging)
    heard, gradients = [], []
    for yes in YES:
        optimizer.zero_grad()
        answer = ask_with_gradients(world, optimizer, world.rank in yes, "stop")
        if used:
            sum((world.rank + 1) * model[i].sum() for i in used).backward()
        optimizer.step()
        heard.append(answer())
        gradients.append([None if p.grad is None else p.grad.tolist() for p in model])
    return heard, gradients, getattr(world, "sent", [])


@pytest.mark.parametrize("compression", ["none", "fp16", "bf16", "int8", "powersgd:2", "topk:0.1"])
def test_one_yes_is_heard_by_all_ranks(compression):
    for heard, gradients, sent in run_ranks(2, lambda world: answers(world, compression=compression)):
        assert heard == [bool(yes) for yes in YES]
        assert gradients == [[[1.5] * 3] * 3] * len(YES)
        assert not any("stop" in name for name in sent)


def test_a_yes_gives_no_gradient_to_what_no_rank_has_used():
    """The first share, into which a yes is put, is that of the last parameter."""
    for heard, gradients, _ in run_ranks(2, lambda world: answers(world, used=(0,))):
        assert heard == [bool(yes) for yes in YES]
        assert gradients == [[[1.5] * 3, None, None]] * len(YES)


def test_a_rank_without_a_backward_pass_is_heard_too():
    for heard, gradients, _ in run_ranks(2, lambda world: answers(world, used=(0, 1, 2) if world.rank else ())):
        assert heard == [bool(yes) for yes in YES]
        assert gradients == [[[1.0] * 3] * 3] * len(YES)


def test_where_gradients_cannot_carry_it_it_travels_by_itself():
    for heard, _, sent in run_ranks(2, lambda world: answers(world, op="adasum")):
        assert heard == [bool(yes) for yes in YES]
        assert sum("stop" in name for name in sent) == len(YES)


def test_a_step_that_averages_nothing_asks_afterwards():
    def work(world):
        parameter = nn.Parameter(torch.ones(2))
        optimizer = world.wrap(torch.optim.SGD([parameter], lr=0.1), nn.ParameterList([parameter]))
        return [ask_with_gradients(world, optimizer, world.rank in yes, "stop")() for yes in YES]

    assert run_ranks(2, work) == [[bool(yes) for yes in YES]] * 2


def test_one_process_asks_itself():
    heard, _, _ = answers(SoloWorld(torch.device("cpu"), Launch("none")))
    assert heard == [0 in yes for yes in YES]
