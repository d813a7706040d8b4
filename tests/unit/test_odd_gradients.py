"""Gradients that a user has put in another's place: without a launch."""

import copy

import pytest
import torch
from thread_world import run_ranks

WHOLE = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)).double()


def swapped(first, second):
    first.weight.grad, second.weight.grad = second.weight.grad, first.weight.grad


def one_for_two(first, second):
    second.weight.grad = first.weight.grad


def one_number(first, second):
    first.bias.grad = first.bias.grad.sum().expand(3)


@pytest.mark.parametrize("changed", [swapped, one_for_two, one_number])
@pytest.mark.parametrize("options", [{}, {"compression": "fp16"}])
def test_what_is_averaged_is_what_each_parameter_has(changed, options):
    """Also of the gradients that the step before has left, which lie in the buffer that is sent."""

    def work(world):
        model = copy.deepcopy(WHOLE)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = world.wrap(optimizer, model, waits_for_caller=True, warns_of_copies=False, **options)
        for step in range(4):
            generator = torch.Generator().manual_seed(10 * step + world.rank)
            if step != 2:  # the third adds to what the second has left
                model.zero_grad()
            model(torch.randn(4, 3, dtype=torch.float64, generator=generator)).square().mean().backward()
            optimizer.step()
            changed(*model)
            expected = [world.all_reduce(p.grad.clone(), "mean", f"mean.{i}") for i, p in enumerate(model.parameters())]
            optimizer.synchronize()
            for parameter, mean in zip(model.parameters(), expected, strict=True):
                torch.testing.assert_close(parameter.grad, mean, rtol=1e-3, atol=1e-3)
        return True

    assert run_ranks(2, work) == [True, True]


@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize("options", [{}, {"compression": "int8"}, {"op": "adasum"}])
@pytest.mark.parametrize("clears", [True, False])
def test_a_step_that_is_left_out_takes_no_average_from_the_next(clears, options, waits):
    """As of a loss that is not finite: no `step()` ends it, and `model.zero_grad()` is not the optimizer's.

    Each rank went on with its own gradient, in silence, where a small model is averaged when it is asked for.
    """

    def work(world):
        model = copy.deepcopy(WHOLE)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = world.wrap(optimizer, model, waits_for_caller=waits, warns_of_copies=False, **options)
        found = []
        for step in range(6):
            if clears or step % 3 == 0:
                model.zero_grad()
            generator = torch.Generator().manual_seed(10 * step + world.rank)
            model(torch.randn(4, 3, dtype=torch.float64, generator=generator)).square().mean().backward()
            optimizer.synchronize()
            found.append([parameter.grad.clone() for parameter in model.parameters()])
            if step % 3 == 2:
                optimizer.step()
        return found

    first, second = run_ranks(2, work)
    for ours, theirs in zip(first, second, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one, other)
