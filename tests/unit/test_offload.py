"""`--optim.offload cpu`: a step in parts, with the state elsewhere between steps, is bitwise the step in one."""

import copy
import dataclasses
import itertools

import pytest
import torch
from test_components import job_of
from test_optimizer_states import KINDS
from test_sharded import NAMES, Coupled, Noisy, both, network, settings
from thread_world import run_ranks
from torch import nn

from hvdtrain.errors import ConfigError
from hvdtrain.models.private_torch import FakeTensorMode
from hvdtrain.optim.table import settings_class
from hvdtrain.process.launch import Launch
from hvdtrain.trainer import memory
from hvdtrain.trainer.component import nested_tensors
from hvdtrain.trainer.memory import check_fits, estimate
from hvdtrain.trainer.without_effect import without_effect
from hvdtrain.world import SoloWorld, offload

WORLD = SoloWorld(torch.device("cpu"), Launch("none"))


@pytest.fixture(autouse=True)
def a_few_parameters_at_a_time(monkeypatch):
    """Largest chunks of some matrices, so that a step has several, and one of one parameter."""
    monkeypatch.setattr(offload, "CHUNK_BYTES", 600)


def wrapped(name, offloaded, model=None):
    model = model or network().double()
    optim = {"momentum": 0.9} if name == "sgd" else {}
    optimizer = settings_class(name)(name=name, peak_lr=0.01, **optim).build(model)
    return model, WORLD.wrap(optimizer, model, offload=offloaded)


def give_gradients(model, step):
    random = torch.Generator().manual_seed(step)
    for number, parameter in enumerate(model.parameters()):
        gradient = torch.randn(parameter.shape, dtype=parameter.dtype, generator=random)
        parameter.grad = None if number == 2 and step < 2 else gradient  # one comes later


def states(optimizer):
    return [
        value
        for entries in optimizer.state_dict()["state"].values()
        for value in entries.values()
        if isinstance(value, torch.Tensor)
    ]


def equal(one, other):
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_steps_bitwise_as_it_does_at_once(name):
    """And goes on from a checkpoint of either, in the middle."""
    torch.manual_seed(0)
    begin = network().double()
    results = []
    for first, then in ((False, False), (True, True), (False, True), (True, False)):
        model, optimizer = wrapped(name, first, copy.deepcopy(begin))
        for step in range(3):
            give_gradients(model, step)
            optimizer.step()
        saved = copy.deepcopy(optimizer.state_dict())
        model, optimizer = wrapped(name, then, model)
        optimizer.load_state_dict(saved)
        for step in range(3, 5):
            give_gradients(model, step)
            optimizer.step()
        results.append(([p.detach().clone() for p in model.parameters()], states(optimizer)))
    (weights, kept), *others = results
    assert not equal(weights, [*begin.parameters()])
    for other_weights, other_kept in others:
        assert equal(weights, other_weights)
        assert equal(kept, other_kept)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_with_sharded_state_it_is_the_undivided_step(name, monkeypatch):
    """With clipping, a skipped step and a moving average, on 3 ranks; the trainer has it where there is a GPU."""
    from hvdtrain.trainer.job import Job

    monkeypatch.setattr(Job, "is_offloaded", property(lambda job: job.config.optim.offload == "cpu"))

    def make(shard):
        return settings(shard, name, {"ema": 0.5}, optim={"offload": "cpu" if shard else "none"})

    assert both(3, make)[0] < 1e-12


def lies_in_host_memory(optimizer):
    large = [tensor for tensor in nested_tensors([*optimizer.state.values()]).values() if tensor.dim()]
    return {id(tensor) for tensor in large} == {id(tensor) for tensor in optimizer.offload._host.values()}


@pytest.mark.parametrize("name", KINDS)
def test_states_of_any_form_take_turns_go_on_and_lie_in_host_memory(name):
    """What counts for all parameters together is refused."""

    def ended(first, then):
        model, saved = network().double(), {}
        for offloaded, steps in ((first, range(3)), (then, range(3, 5))):
            optimizer = WORLD.wrap(KINDS[name](model.parameters(), lr=0.01), model, offload=offloaded)
            if steps[0]:
                optimizer.load_state_dict(saved)
                assert not offloaded or lies_in_host_memory(optimizer)
            for step in steps:
                give_gradients(model, step)
                optimizer.step()
            saved = copy.deepcopy(optimizer.state_dict())
            assert not offloaded or lies_in_host_memory(optimizer)
        return [p.detach() for p in model.parameters()]

    torch.manual_seed(0)
    if name in ("of_a_name", "tensor_of_a_name"):
        with pytest.raises(ConfigError, match=r"--optim\.offload cpu steps one part"):
            ended(True, True)
        return
    whole, *others = [(torch.manual_seed(0), ended(*ways))[1] for ways in itertools.product((False, True), repeat=2)]
    assert all(equal(whole, other) for other in others)


def test_hooks_are_called_once_a_step_and_a_closure_too():
    model, optimizer = wrapped("adamw", True)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    def closure():
        calls.append("closure")
        give_gradients(model, 2)
        return 3.0

    assert optimizer.step(closure) == 3.0
    assert calls == ["before", "closure", "after"]
    assert [len(group["params"]) for group in optimizer.param_groups] == [5, 11]


class Counting(torch.optim.SGD):
    """Counts its steps for all parameters together."""

    count = 0

    def step(self, closure=None):
        self.count += 1
        for group in self.param_groups:
            for p in group["params"]:
                p.data.sub_(p.grad / self.count)


@pytest.mark.parametrize("kind", [Coupled, Noisy, Counting, torch.optim.LBFGS])
def test_what_cannot_take_turns_is_refused(kind):
    model = nn.Linear(3, 2)
    with pytest.raises(ConfigError, match=r"--optim\.offload cpu steps one part of the parameters after the other"):
        WORLD.wrap(kind(model.parameters(), lr=0.1), model, offload=True)


def test_an_exception_in_a_step_leaves_the_groups_as_they_were():
    model, optimizer = wrapped("adamw", True)
    give_gradients(model, 2)
    last = [*model.parameters()][-1]
    last.grad = torch.zeros_like(last).to_sparse()
    before = [list(group["params"]) for group in optimizer.param_groups]
    with pytest.raises(RuntimeError):
        optimizer.step()
    after = [group["params"] for group in optimizer.param_groups]
    assert all(a is b for one, other in zip(before, after, strict=True) for a, b in zip(one, other, strict=True))


def test_between_steps_state_lies_in_host_memory_and_in_steps_where_the_parameters_are():
    """On fake tensors: places are real, there is no GPU."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        parameters = [nn.Parameter(torch.empty(20, 20, device="cuda")) for _ in range(3)]
        optimizer = torch.optim.AdamW(parameters, lr=0.1, foreach=False)
        kept = offload.Offload.__new__(offload.Offload)
        kept._host, kept._memory = {}, {}
        places = []

        def step(optimizer):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    entries = optimizer.state[parameter]
                    places.extend(entry.device.type for entry in entries.values())
                    entries.update(exp_avg=torch.empty_like(parameter), step=torch.empty((), device="cpu"))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(offload.torch.cuda, "synchronize", lambda device: places.append(f"wait for {device.type}"))
            patch.setattr(offload, "_pins", lambda parameter: False)  # nothing is there to pin it
            for _ in range(2):
                for parameter in parameters:
                    parameter.grad = torch.empty_like(parameter)
                kept.step(optimizer, step)
        assert {e["exp_avg"].device.type for e in optimizer.state.values()} == {"cpu"}
    assert places == ["wait for cuda", *3 * ["cuda", "cpu"], "wait for cuda"]


def test_memory_is_counted_where_it_lies(tmp_path, monkeypatch):
    job = job_of(tmp_path)
    optim = dataclasses.replace(job.config.optim, offload="cpu")
    offloaded = dataclasses.replace(job, config=dataclasses.replace(job.config, optim=optim))
    (line,) = without_effect(offloaded)
    assert line.startswith("offload:    no effect of --optim.offload cpu")
    plain = estimate(job)
    assert estimate(offloaded) == plain
    assert plain.host == 0
    monkeypatch.setattr(type(job), "is_offloaded", property(lambda job: True))
    monkeypatch.setattr(offload, "CHUNK_BYTES", 1)
    moved = estimate(offloaded)
    sizes = [p.nbytes for p in job.task.model.parameters()]
    assert moved.host == 2 * sum(sizes) + 4 * len(sizes)  # two numbers a weight, and a counter a tensor
    assert plain.optimizer - moved.optimizer == moved.host - 2 * max(sizes) - 4
    assert "in host memory" in str(moved)
    monkeypatch.setattr(memory, "in_host_memory", lambda ranks: (10, "are free here for each of 1"))
    with pytest.raises(ConfigError, match=r"--optim\.offload cpu keeps .* a rank in host memory"):
        check_fits(offloaded, moved)


def test_on_ranks_the_estimate_knows_shares_and_parts(monkeypatch):
    from test_sharded import wide_task

    from hvdtrain.trainer.job import Job
    from hvdtrain.trainer.rehearsal import rehearse

    monkeypatch.setattr(Job, "is_offloaded", property(lambda job: True))
    task = wide_task()

    def work(world):
        return estimate(rehearse(task, settings(True), world, num_steps=20))

    (needed, *_), total = run_ranks(4, work), sum(p.numel() for p in task.model.parameters())
    assert needed.host == pytest.approx(2 * 8 * total / 4, rel=0.01)
    assert needed.optimizer < needed.host + 64
