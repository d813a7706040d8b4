"""Gradients that would be each rank's own where a loop takes them for the mean: that is told."""

import logging
import threading

import pytest
import torch
from loops import Ranks, loss_of, network, sgd
from thread_world import run_ranks
from torch import nn

from hvdtrain.errors import DivergedError


@pytest.mark.parametrize("options", [{"accum_steps": 2}, {"waits_for_caller": True}])
def test_a_step_that_skips_the_average_needs_one_before(options):
    def work(world):
        model = network()
        optimizer = world.wrap(sgd(model), model, **options)
        loss_of(model, Ranks(world), 0).backward()
        with optimizer.skip_synchronize(), pytest.raises(RuntimeError, match=r"call optimizer\.synchronize\(\) before"):
            optimizer.step()
        optimizer.synchronize()
        with optimizer.skip_synchronize():
            optimizer.step()
        return model[0].weight.detach()

    first, second = run_ranks(2, work)
    assert torch.equal(first, second)


def test_parameters_that_take_the_place_of_others_are_told_of(caplog):
    """Without the optimizer's `zero_grad`, nothing has seen them before backward."""

    def work(world):
        model = network()
        optimizer = world.wrap(sgd(model), model)
        for step in range(3):
            if step == 1:
                model = network(3)
                optimizer.param_groups[0]["params"] = list(model.parameters())
            model.zero_grad()
            loss_of(model, Ranks(world), step).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            optimizer.step()

    with caplog.at_level(logging.WARNING):
        run_ranks(2, work)
    told = [record.getMessage() for record in caplog.records if "is averaged by step()" in record.getMessage()]
    assert len(told) == 1
    assert told[0].startswith(
        "the gradient of parameter 0 and 3 more is averaged by step(), and not at the end of backward()"
    )


def test_threads_that_compute_gradients_at_the_same_time_are_told():
    def work(world):
        model = network()
        optimizer = world.wrap(sgd(model), model)
        inside, outside = threading.Event(), threading.Event()

        def wait(gradient):
            inside.set()
            outside.wait(30)

        x = torch.ones(2, 6, dtype=torch.float64)
        hidden = model[0](x)
        hidden.register_hook(wait)
        first = threading.Thread(target=model[2](hidden).sum().backward)
        first.start()
        inside.wait(30)
        with pytest.raises(RuntimeError, match="two threads compute gradients for one optimizer at the same time"):
            model(x).sum().backward()
        outside.set()
        first.join()
        return optimizer is not None

    assert run_ranks(2, work) == [True, True]


def test_buffers_of_other_layouts_are_averaged_or_compared():
    def work(world):
        model = nn.Module()
        model.register_buffer("repeated", torch.full((1,), float(world.rank)).expand(3))
        model.register_buffer("edges", torch.eye(2).to_sparse())
        world.average_buffers(model)
        assert model.repeated.tolist() == [0.5] * 3
        model.register_buffer("edges", (torch.eye(2) * (1 + world.rank)).to_sparse())
        with pytest.raises(DivergedError, match="the ranks are not equal: edges"):
            world.average_buffers(model)
        return True

    assert run_ranks(2, work) == [True, True]
