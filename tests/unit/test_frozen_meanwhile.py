"""Parameters that are frozen while a step is under way, and gradients that somebody holds: without a launch."""

import copy

import pytest
import torch
from thread_world import run_ranks

WAYS = {
    "usual": {},
    "when asked": {"waits_for_caller": True},
    "in parts": {"bucket_bytes": 1},
    "sharded": {"shard": True},
    "sharded when asked": {"shard": True, "waits_for_caller": True},
}


WHOLE = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()


def network():
    return copy.deepcopy(WHOLE)  # ranks are threads, and would draw from one generator


def loss_of(model, world, place):
    generator = torch.Generator().manual_seed(10 * place + world.rank)
    return model(torch.randn(5, 3, dtype=torch.float64, generator=generator)).square().mean()


def trained(world, freezing, **options):
    """Train five steps of two passes; `freezing(model, place)` comes ahead of pass 0 and 1, and behind them, as 2."""
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    optimizer = world.wrap(optimizer, model, accum_steps=2, **options)
    for step in range(5):
        optimizer.zero_grad()
        for place in range(2):
            freezing(model, place)
            loss_of(model, world, 2 * step + place).backward()
        freezing(model, 2)
        optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


def in_turn(model, place):
    """Train one layer in each pass."""
    model[0].requires_grad_(place == 0)
    model[2].requires_grad_(place == 1)


def for_a_pass(model, place):
    """Train a layer in the first pass of every step alone."""
    model[2].requires_grad_(place == 0)


def once_over(model, place):
    """Freeze a layer as soon as backward is over."""
    model[2].requires_grad_(place < 2)


@pytest.mark.parametrize("freezing", [in_turn, for_a_pass, once_over])
@pytest.mark.parametrize("way", WAYS)
def test_what_was_frozen_since_it_got_a_gradient_moves_alike_on_all_ranks(way, freezing):
    """As it does on one process, whose optimizer moves what has a gradient."""
    others = run_ranks(2, lambda world: trained(world, freezing, **WAYS[way]))
    usual = run_ranks(2, lambda world: trained(world, freezing))[0]
    for ours in others:
        for mine, theirs in zip(ours, usual, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
    assert all(a.equal(b) for a, b in zip(*others, strict=True))
    assert all(not now.equal(then) for now, then in zip(usual, network().parameters(), strict=True))


@pytest.mark.parametrize("waits", [False, True])
def test_the_mean_square_is_there_where_the_next_step_trains_other_layers(waits):
    def work(world):
        model, found = network(), []
        optimizer = world.wrap(
            torch.optim.SGD(model.parameters(), lr=0.1), model, has_square=True, waits_for_caller=waits
        )
        for step in range(4):
            optimizer.zero_grad()
            loss_of(model, world, step).backward()
            own = sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None) if waits else None
            model[0].requires_grad_(step % 2 == 1)
            optimizer.synchronize()
            found.append((own, optimizer.mean_square.item()))
            optimizer.step()
        return found

    for first, second in zip(*run_ranks(2, work), strict=True):
        assert first[1] == second[1] > 0
        if waits:
            assert first[1] == pytest.approx((first[0] + second[0]).item() / 2)


def test_adasum_finds_the_gradient_where_somebody_holds_the_one_before():
    """`ThreadWorld` adds where Horovod combines."""

    def work(world):
        model, held = network(), []
        optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model, op="adasum", waits_for_caller=True)
        for step in range(3):
            optimizer.zero_grad()
            loss_of(model, world, step).backward()
            own = [parameter.grad.clone() for parameter in model.parameters()]
            optimizer.synchronize()
            held.append([parameter.grad for parameter in model.parameters()])
            others = [world.all_reduce(gradient, "sum", f"check.{i}") for i, gradient in enumerate(own)]
            for mine, combined in zip(held[-1], others, strict=True):
                torch.testing.assert_close(mine, combined)
            optimizer.step()
        return True

    assert run_ranks(2, work) == [True, True]


def test_adasum_takes_parameters_that_lie_in_another_order():
    """Horovod takes no tensor that is not contiguous; nor does `ThreadWorld`."""

    def work(world):
        model = torch.nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)
        model.turned = torch.nn.Parameter(torch.randn(5, 3).t())
        optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model, op="adasum")
        pixels = torch.full((1, 2, 3, 3), 1.0 + world.rank)
        (model(pixels).sum() + model.turned[0].sum() * (1 + world.rank)).backward()
        optimizer.synchronize()
        return [parameter.grad.clone() for parameter in model.parameters()]

    for weight, bias, turned in run_ranks(2, work):
        assert weight.eq(3).all()
        assert bias.eq(2).all()
        assert turned.sum(1).tolist() == [15, 0, 0]
