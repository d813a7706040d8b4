"""Ranks that have made different things: gradients would be averaged with those of other parameters, in silence."""

import logging

import pytest
import torch
from thread_world import run_ranks
from torch import nn

from hvdtrain.errors import ConfigError


def heads(names):
    return nn.ModuleDict({name: nn.Linear(2, 2) for name in names})


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def turned(world):
    """Return two heads in the order in which a set may have their names in this process."""
    return heads(["left", "right"] if world.rank == 0 else ["right", "left"])


def frozen(world):
    model = heads(["left", "right"])
    model["left"].requires_grad_(world.rank == 0)
    return model


def grouped(world):
    """Return a model, and an optimizer of it that has more groups on one rank."""
    model = heads(["left", "right"])
    groups = [{"params": head.parameters()} for head in model.values()]
    return model, sgd(groups if world.rank else model.parameters())


def wrapped(world, model, **settings):
    return world.wrap(sgd(model.parameters()), model, **settings)


CALLS = {
    "order": (
        lambda world: wrapped(world, turned(world)),
        r"wrap\(\) number 1: rank 1 has right\.weight \(2, 2\) torch.float32 where rank 0 has left\.weight",
    ),
    "frozen": (
        lambda world: wrapped(world, frozen(world)),
        r"rank 1 has left\.weight \(2, 2\) torch\.float32, frozen where rank 0 has left\.weight \(2, 2\) torch",
    ),
    "more": (
        lambda world: wrapped(world, heads("abc"[: 2 - world.rank])),
        r"rank 1 has nothing where rank 0 has b\.weight \(2, 2\)",
    ),
    "settings": (
        lambda world: (lambda model: world.wrap(sgd(model.parameters()), model, accum_steps=1 + world.rank))(
            heads("a")
        ),
        r"rank 1 has accum_steps = 2 where rank 0 has accum_steps = 1",
    ),
    "state": (
        lambda world: world.broadcast_state(turned(world)),
        r"broadcast_state\(model\): rank 1 has right\.weight .* where rank 0 has left\.weight .*goes through a set",
    ),
    "groups": (
        lambda world: world.broadcast_state(*grouped(world)),
        r"optimizer's state: rank 1 has group 0 of SGD = 2 where rank 0 has group 0 of SGD = 4",
    ),
    "shapes": (
        lambda world: world.broadcast_state(nn.Linear(3 - world.rank, 2 + world.rank, bias=False)),
        r"rank 1 has weight \(3, 2\) torch\.float32 where rank 0 has weight \(2, 3\)",
    ),
}


@pytest.mark.parametrize("kind", CALLS)
def test_what_differs_is_told_on_all_ranks(kind):
    call, words = CALLS[kind]

    def work(world):
        with pytest.raises(ConfigError, match=words):
            call(world)
        return True

    assert run_ranks(2, work) == [True, True]


def test_an_optimizer_made_of_a_set_is_told(caplog):
    """Its gradients are averaged as they should be, and its state, which is numbered, fits no other rank's."""

    def work(world):
        model = heads(["left", "right"])
        parameters = [*model.parameters()][:: 1 if world.rank else -1]
        optimizer = world.wrap(sgd(parameters), model)
        for name, head in model.items():
            head(torch.ones(1, 2) * (1 + world.rank if name == "left" else 5)).sum().backward()
        optimizer.step()
        return [model["left"].weight.grad[0, 0].item(), model["right"].weight.grad[0, 0].item()]

    with caplog.at_level(logging.WARNING):
        assert run_ranks(2, work) == [[1.5, 5.0]] * 2
    assert [record.getMessage() for record in caplog.records if "another order" in record.getMessage()] == [
        "the parameters of this SGD stand in another order on other ranks: one rank's state does not fit another one,"
        " nor a saved one the next run. Give it a list instead of a set"
    ]


@pytest.mark.parametrize("whose", ["all", "own"])
def test_a_schedule_that_goes_by_a_ranks_own_loss_is_told_of(whose, caplog):
    """Learning rates, and so weights, went apart in silence."""

    def work(world):
        model = nn.Linear(2, 1).double()
        optimizer = world.wrap(sgd(model.parameters()), model)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        for step in range(5):
            optimizer.zero_grad()
            model(torch.full((1, 2), 1.0 + world.rank + step, dtype=torch.float64)).sum().backward()
            optimizer.step()
            own = torch.tensor(step * (2.0 * world.rank - 1))  # falls on rank 0, and rises on rank 1
            schedule.step(world.all_reduce(own, "mean") if whose == "all" else own)
        return optimizer.param_groups[0]["lr"]

    with caplog.at_level(logging.WARNING):
        rates = run_ranks(2, work)
    told = [record.getMessage() for record in caplog.records if "differ in their settings" in record.getMessage()]
    assert (rates[0] == rates[1]) == (whose == "all")
    assert len(told) == (whose == "own")
    assert all(
        "goes by must be the same on all ranks, as ReduceLROnPlateau's step(world.all_reduce(" in text for text in told
    )
