"""SGD in one pass against torch's own, and an optimizer's step without its entry in a profile."""

import copy

import pytest
import torch
from torch import nn

from hvdtrain.optim.fused_sgd import SGD
from hvdtrain.optim.private_optimizer import without_record
from hvdtrain.optim.sgd import SgdConfig
from hvdtrain.process.launch import Launch
from hvdtrain.world import SoloWorld

WAYS = [
    {},
    {"weight_decay": 0.01},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
]


def weights():
    """Return weights of several types and layouts."""
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(30, 20, generator=generator),
        torch.randn(7, generator=generator),
        torch.randn(4, 6, 3, 3, generator=generator).to(memory_format=torch.channels_last),
        torch.randn(5, generator=generator, dtype=torch.float64),
        torch.randn(3, 2, generator=generator, dtype=torch.complex64),
    ]
    return [nn.Parameter(tensor) for tensor in tensors]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_it_moves_as_torchs_own_also_where_a_gradient_comes_late(way):
    ours, theirs = weights(), weights()
    decay = way.get("weight_decay", 0.0)
    rest = {name: value for name, value in way.items() if name != "weight_decay"}
    optimizers = (
        SGD([{"params": ours, "weight_decay": decay}], lr=0.1, **rest),
        torch.optim.SGD([{"params": theirs, "weight_decay": decay}], lr=0.1, **rest),
    )
    generator = torch.Generator().manual_seed(1)
    for step in range(4):
        for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            if number == 1 and step < 2:
                continue
            # Contiguous, whatever the weight; a complex one is conjugated when it is read, as backward may leave it.
            one.grad = torch.randn(one.shape, generator=generator, dtype=one.dtype).conj()
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        assert way or torch.equal(one, other)  # one pass is one pass: bit by bit


def test_a_first_step_that_is_skipped_leaves_no_momentum():
    (weight, *_), (twin, *_) = weights(), weights()
    skipping, plain = SGD([weight], lr=0.1, momentum=0.9), SGD([twin], lr=0.1, momentum=0.9)
    weight.grad = torch.full_like(weight, torch.inf)
    before = weight.detach().clone()
    skipping.found_inf = torch.ones(())
    skipping.step()
    assert torch.equal(weight, before)
    del skipping.found_inf
    for parameter, optimizer in ((weight, skipping), (twin, plain)):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert torch.equal(weight, twin)


def test_sparse_embeddings_keep_torchs_own():
    config = SgdConfig(momentum=0.9)
    assert type(config.build(nn.Embedding(4, 2, sparse=True))) is torch.optim.SGD
    assert type(config.build(nn.Linear(4, 2))) is SGD


def test_hooks_run_and_profilers_see_a_step_that_is_told_to_them_alone():
    model = nn.Linear(2, 1)
    optimizer = SoloWorld(torch.device("cpu"), Launch("none")).wrap(torch.optim.SGD(model.parameters(), lr=0.5), model)
    seen = []
    optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: seen.append((len(args), kwargs)))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    model(torch.ones(1, 2)).sum().backward()
    expected = [p.detach() - 0.5 * p.grad for p in model.parameters()]
    assert optimizer.step(closure=lambda: 7.0) == 7.0
    assert all(torch.equal(p, other) for p, other in zip(model.parameters(), expected, strict=True))
    assert seen == [(1, {"closure": seen[0][1]["closure"]}), "after"]
    with torch.profiler.profile() as profile:
        optimizer.step()
    assert "Optimizer.step#SGD.step" in {event.key for event in profile.key_averages()}
    assert seen[2:] == [(1, {}), "after"]


def test_a_hook_may_replace_what_step_is_given():
    model = nn.Linear(1, 1)
    optimizer = SoloWorld(torch.device("cpu"), Launch("none")).wrap(torch.optim.SGD(model.parameters(), lr=0.5), model)
    optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: (args, {"closure": lambda: 3.0}))
    assert optimizer.step() == 3.0


def test_a_step_without_torchs_hooks_is_left_alone():
    def step(self):
        return None

    assert without_record(step) is step


def test_a_copy_goes_on_alike():
    model = nn.Linear(3, 2)
    optimizer = SgdConfig(momentum=0.9, weight_decay=0.1).build(model)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    again = SgdConfig(momentum=0.9, weight_decay=0.1).build(model)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert again.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    own = optimizer.state_dict()["state"]
    assert all(
        torch.equal(entry["momentum_buffer"], own[key]["momentum_buffer"])
        for key, entry in again.state_dict()["state"].items()
    )
