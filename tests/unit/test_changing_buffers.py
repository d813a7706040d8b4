"""Buffers that a step changes are made equal on all ranks, of whatever type; a rank's own are left alone."""

import types

import pytest
import torch
from thread_world import run_ranks

from hvdtrain.trainer.buffers import ChangingBuffers, _settle_unseen
from hvdtrain.trainer.strategy import EveryStep
from hvdtrain.world import keep_per_rank

LARGE = 2**53 + 1


def test_types_and_a_ranks_own():
    def work(world):
        model = torch.nn.Module()
        start = {
            "mean": torch.zeros(2, 3).t(),
            "pairs": torch.zeros(2, dtype=torch.complex64),
            "low": torch.zeros(2, dtype=torch.bfloat16),
            "count": torch.zeros((), dtype=torch.int64),
            "seen": torch.zeros(2, dtype=torch.bool),
            "queue": torch.zeros(2),
            "still": torch.ones(2),
        }
        for name, tensor in start.items():
            model.register_buffer(name, tensor)
        keep_per_rank(model, "queue")
        buffers = ChangingBuffers(types.SimpleNamespace(world=world, log=None))
        buffers.begin(model)
        for _ in range(2):
            model.mean += world.rank
            model.pairs += 1j * world.rank
            model.low += 2 * world.rank
            model.count.fill_(LARGE - world.rank)
            model.seen[world.rank] = True
            model.queue.fill_(world.rank + 5)
            buffers.average(world)
        return buffers.names, [tensor.flatten()[0].item() for tensor in model.buffers()], model.seen.tolist()

    for rank, (names, values, seen) in enumerate(run_ranks(2, work)):
        assert names == ["mean", "pairs", "low", "count", "seen"]
        assert values == [1.0, 1j, 2.0, LARGE, True, rank + 5, 1.0]
        assert seen == [True, True]


def test_a_normalisation_that_is_trained_later():
    def work(world):
        model = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2)).double()
        model[1].eval()
        buffers = ChangingBuffers(types.SimpleNamespace(world=world, log=None))
        buffers.begin(model)
        names = []
        for step in range(3):
            if step == 2:
                model.train()
            model(torch.arange(8.0).view(4, 2).double() * (world.rank + 1))
            buffers.average(world)
            names.append(len(buffers.names))
        return names, [tensor.tolist() for tensor in model.buffers()]

    (names, first), (_, second) = run_ranks(2, work)
    assert names == [3, 3, 6]
    assert first == second


def test_one_that_begins_to_change_late_is_noticed_and_averaged():
    """On some ranks only, and one that is registered late."""

    def work(world):
        said = []
        model = torch.nn.BatchNorm1d(2).double()
        model.register_buffer("late", torch.zeros(2))
        log = types.SimpleNamespace(say=said.append)
        buffers = ChangingBuffers(types.SimpleNamespace(world=world, log=log))
        training = types.SimpleNamespace(strategy=EveryStep(), step=0)
        buffers.begin(model)
        for step in range(4):
            training.step = step + 1
            model(torch.arange(8.0).view(4, 2).double() * (world.rank + 1))
            if step == 2 and world.rank == 1:
                model.late += 4
            if step == 3:
                model.register_buffer("later", torch.full((1,), float(world.rank)))
            buffers.average(world)
            buffers.before_looking(training)
        return said, buffers.names, [tensor.tolist() for tensor in model.buffers()]

    (said, names, first), (_, _, second) = run_ranks(2, work)
    assert first == second
    assert first[-2:] == [[2.0, 2.0], [0.5]]
    assert names[-2:] == ["late", "later"]
    assert [line.split(":")[1].split()[0] for line in said] == ["late", "later"]
    assert "by step 3: averaged over the ranks from now on" in said[0]


def trained(world, goes_along):
    """Take steps with a normalisation; returns what was begun and waited for in the last one, and all buffers."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
    optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model)
    buffers = ChangingBuffers(types.SimpleNamespace(world=world, log=None))
    if goes_along:
        buffers.attach(types.SimpleNamespace(optimizer=optimizer))
    buffers.begin(model)
    seen, start = [], world._start

    def noting(name, value, finish):
        seen.append(f"start {name}")
        wait = start(name, value, finish)

        def noted():
            seen.append(f"wait {name}")
            return wait()

        return noted

    world._start = noting
    for step in range(4):
        seen.clear()
        if step == 2:
            model[1].register_buffer("late", torch.zeros(1))  # what is not known yet does no harm
        x = (torch.arange(8.0).view(4, 2).double() + step) * (world.rank + 1)
        optimizer.zero_grad()
        if world.rank == 0 or step != 3:  # a rank without a batch averages all the same
            model(x).square().mean().backward()
        optimizer.synchronize()
        buffers.average(world)
        optimizer.step()
    return seen, [tensor.tolist() for tensor in model.buffers()]


def test_known_ones_travel_beside_the_gradients():
    """Nothing waits for them alone, and they are what an all-reduce of their own makes of them."""
    (alone, expected), (_, same) = run_ranks(2, lambda world: trained(world, goes_along=False))
    for seen, buffers in run_ranks(2, lambda world: trained(world, goes_along=True)):
        assert buffers == expected == same
        waits = [i for i, what in enumerate(seen) if what.startswith("wait gradients")]
        assert seen.index("start buffers.mean") < min(waits)
        assert seen.index("start buffers.max") < min(waits)
        assert sorted(seen) == sorted(alone)  # once, and not again
    assert alone.index("start buffers.mean") > max(i for i, what in enumerate(alone) if what.startswith("wait grad"))


@pytest.mark.parametrize("is_counted", [False, True])
def test_a_gpus_buffers_are_what_they_were_where_a_step_does_not_count(is_counted):
    """Without a look at that, all small ones of a type together: of any shape, layout, type and size."""
    before = [
        torch.arange(6.0).view(2, 3).t(),
        torch.zeros((), dtype=torch.int64),
        torch.zeros(2, dtype=torch.complex64),
        torch.zeros(2, dtype=torch.bool),
        torch.zeros(0),
        torch.zeros(70_000),
        torch.full((3,), 2.0, dtype=torch.bfloat16),
        torch.ones(4, 1, 2),
    ]
    now = [tensor + 1 if tensor.dtype != torch.bool else ~tensor for tensor in before]
    if not is_counted:
        now[0][0, 0] = torch.nan
    kept, buffers = [tensor.clone() for tensor in before], [tensor.clone() for tensor in now]
    _settle_unseen(list(zip(buffers, kept, strict=True)), torch.tensor(is_counted))
    for own, copy, expected in zip(buffers, kept, now if is_counted else before, strict=True):
        assert torch.equal(own, expected)
        assert torch.equal(copy, expected)
        assert own.stride() == expected.stride()


def test_the_only_one_that_has_no_value_before_the_first_pass():
    def work(world):
        model = torch.nn.Linear(2, 1)
        model.register_buffer("mean", None)
        buffers = ChangingBuffers(types.SimpleNamespace(world=world, log=None))
        buffers.begin(model)
        buffers.average(world)  # nothing as yet
        model.mean = torch.full((2,), float(world.rank))
        buffers.average(world)
        return model.mean.tolist()

    assert run_ranks(2, work) == [[0.5, 0.5]] * 2
