"""A loop of one process started on several ranks, which all read the same: said once, and never where they do not."""

import copy
import itertools

import pytest
import torch
from thread_world import run_ranks
from torch import nn

NETWORK = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))
LINE = nn.Linear(3, 1)


def train(world, *, same, steps=5, dtype=torch.float32, zero=None, accum=1, **options):
    """Train a small network on random numbers, the same ones on all ranks or not."""
    model = copy.deepcopy(NETWORK).to(dtype)
    optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model, accum_steps=accum, **options)
    generator = torch.Generator().manual_seed(7 if same else world.rank)
    for _ in range(steps):
        optimizer.zero_grad(**(zero or {}))
        for _ in range(accum):
            x = torch.randn(4, 6, generator=generator).to(dtype)
            model(x).square().mean().backward()
        optimizer.step()


def said(caplog, ranks, **options):
    caplog.clear()
    run_ranks(ranks, lambda world: train(world, **options))
    return [record.getMessage() for record in caplog.records if "the same gradient" in record.getMessage()]


CASES = [
    {},
    {"dtype": torch.float64},
    {"dtype": torch.bfloat16},
    {"zero": {"set_to_none": False}},
    {"accum": 2},
]


@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize("ranks", [2, 3])
def test_the_same_samples_are_said_once_and_others_never(caplog, ranks, options):
    (line,) = said(caplog, ranks, same=True, **options)
    assert f"all {ranks} ranks" in line
    assert "sampler=world.sampler(len(dataset))" in line
    assert said(caplog, ranks, same=False, **options) == []


@pytest.mark.parametrize("options", [{"compression": "powersgd:2"}, {"warns_of_copies": False}, {"steps": 2}], ids=str)
def test_where_nothing_is_known_nothing_is_said(caplog, options):
    assert said(caplog, 2, same=True, **options) == []


def test_two_equal_batches_by_chance_say_nothing(caplog):
    """As those of a warm-up with a batch of ones."""

    def work(world):
        model = copy.deepcopy(LINE)
        optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model)
        own = torch.full((2, 3), 2.0 + world.rank)
        for x in [torch.ones(2, 3), torch.ones(2, 3), *itertools.repeat(own, 4)]:
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

    run_ranks(2, work)
    assert "the same gradient" not in caplog.text


def test_ranks_without_gradients_say_nothing(caplog):
    def work(world):
        model = copy.deepcopy(LINE)
        optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model)
        for _ in range(5):
            optimizer.zero_grad()
            (0 * model(torch.ones(2, 3)).sum()).backward()
            optimizer.step()

    run_ranks(2, work)
    assert "the same gradient" not in caplog.text
