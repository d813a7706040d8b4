"""A question that travels with the gradients: one yes is heard by all ranks, and costs no collective of its own."""

import pytest
import torch
from thread_world import run_ranks
from torch import nn

from hvdtrain.process.launch import Launch
from hvdtrain.world import Asking, SoloWorld
from hvdtrain.world.asking import wanted_steps
from hvdtrain.world.question import ask_with_gradients

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


class Clock:
    """Seconds that pass when somebody says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def asked_while_apart(world, clock, say_yes_at, latency_s, step_s=0.1, steps=60):
    """Train apart in steps of so many seconds; returns after which steps all have heard a yes, and how long each took.

    An answer is there `latency_s` after its question.
    """
    optimizer = SoloWorld(torch.device("cpu"), Launch("none")).wrap(
        torch.optim.SGD([nn.Parameter(torch.ones(1))]), nn.Linear(1, 1)
    )
    begin = world.start_all_reduce

    def slowly(tensor, op, name):
        wait, there = begin(tensor, op, name), clock.now + latency_s

        def wait_for():
            clock.now = max(clock.now, there)
            return wait()

        return wait_for

    world.start_all_reduce = slowly
    asking, heard, took = Asking(world, optimizer, clock=clock), [], []
    for step in range(steps):
        began = clock.now
        asking.ask(world.rank == 1 and step == say_yes_at)
        clock.now += step_s
        if asking.answer():
            heard.append(step)
        took.append(clock.now - began)
    asking.close()
    return heard, took, asking.steps, sum(name == "stop" for name in world.sent)


@pytest.mark.parametrize("latency_s", [0.0, 0.35, 5.0])
def test_ranks_that_train_apart_wait_for_no_answer_but_the_first_ones(latency_s):
    """All hear it after the same step; no later than a second, or the message itself, after the next question."""

    def work(world):
        return asked_while_apart(world, Clock(), None, latency_s)

    for heard, took, steps, asked in run_ranks(2, work):
        assert not heard
        assert steps in {0.0: (1,), 0.35: (5,), 5.0: (9, 10)}[latency_s]
        waits = [seconds for seconds in took[20:] if seconds > 0.1 + 1e-9]
        assert bool(waits) == (latency_s == 5.0)  # longer than a second is not hidden
        # Half a second, or five steps, lies between an answer and the next question.
        assert asked == pytest.approx(60 / (steps + 5), abs=4)


def test_a_yes_is_heard_by_all_ranks_after_the_same_step():
    for step in range(20, 32):
        (heard, _, _, _), other = run_ranks(2, lambda world: asked_while_apart(world, Clock(), step, 0.35))  # noqa: B023
        assert other[0] == heard
        assert len(heard) <= 1
        # Whoever is asked says yes for as long as it is asked; here it was, in one step only.
        assert not heard or step <= heard[0] < step + 5


def test_an_answer_is_not_waited_for_behind_what_travels():
    """What was sent before takes the wire for 12 steps: a question asked then is read when that has been taken."""

    def work(world):
        optimizer = SoloWorld(torch.device("cpu"), Launch("none")).wrap(
            torch.optim.SGD([nn.Parameter(torch.ones(1))]), nn.Linear(1, 1)
        )
        begin, reads = world.start_all_reduce, []

        def noted(tensor, op, name):
            wait = begin(tensor, op, name)
            return lambda: (reads.append(step), wait())[1]

        world.start_all_reduce = noted
        clock = Clock()
        asking, step = Asking(world, optimizer, clock=clock), 0
        for step in range(20):
            asking.ask(step >= 2, 12 - step)
            clock.now += 1.0
            if asking.answer():
                return step, reads
        return None

    assert run_ranks(2, work) == [(12, [11, 12])] * 2


def test_steps_that_hide_a_question():
    assert wanted_steps(1, 0.1, 0.0, 0.1) == 1
    assert wanted_steps(1, 0.1, 0.25, 0.35) == 5
    assert wanted_steps(4, 0.1, 0.001, 0.4) == 4
    assert wanted_steps(4, 3.0, 2.0, 9.0) == 1  # a step takes longer than an answer may be late
    assert wanted_steps(1, 0.0, 0.1, 0.1) == 16
