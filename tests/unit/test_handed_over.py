"""What `World` is given by loops of users' own: other objects, parameters of nobody's model, names that are taken."""

import pytest
import torch
from thread_world import run_ranks
from torch import nn

from hvdtrain.errors import ConfigError, UsageError
from hvdtrain.process.launch import Launch
from hvdtrain.world import SoloWorld, carriers

SOLO = SoloWorld(torch.device("cpu"), Launch("none"))


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda model, optimizer: SOLO.wrap(model, optimizer), "wrap\\(optimizer, model\\) was given .* type SGD as the model"),
        (lambda model, optimizer: SOLO.wrap(model, model), "type Linear as the optimizer"),
        (lambda model, optimizer: SOLO.wrap(optimizer, [model, model]), r"one as torch.nn.ModuleList\(\[...\]\)"),
        (lambda model, optimizer: SOLO.wrap(optimizer, model.parameters()), "give the torch.nn.Module itself"),
        (lambda model, optimizer: SOLO.wrap(optimizer, None), "of type NoneType as the model"),
        (lambda model, optimizer: SOLO.broadcast_state(optimizer), "broadcast_state\\(model, optimizer\\) was given"),
        (lambda model, optimizer: SOLO.sampler([1, 2, 3]), r"world.sampler\(len\(dataset\)\)"),
        (lambda model, optimizer: SOLO.sampler(8.0), "not an object of type float"),
    ],
)
def test_other_objects_are_told(call, says):
    model = nn.Linear(2, 1)
    with pytest.raises(UsageError, match=says):
        call(model, sgd(model))


@pytest.mark.parametrize("name", ["offload", "codec", "mean_square", "_exchange", "_inner", "synchronize"])
def test_a_name_that_is_taken_is_told(name):
    class Own(torch.optim.SGD):
        def __init__(self, params):
            super().__init__(params, lr=0.1)
            setattr(self, name, "mine")

    optimizer = Own(nn.Linear(2, 1).parameters())
    with pytest.raises(ConfigError, match=f"something of its own by the name of {name}"):
        SOLO.wrap(optimizer, nn.Linear(2, 1))
    of_class = type("Own", (torch.optim.SGD,), {name: property(lambda self: 1)})
    model = nn.Linear(2, 1)
    with pytest.raises(ConfigError, match=f"by the name of {name}"):
        SOLO.wrap(of_class(model.parameters(), lr=0.1), model)


def test_parameters_outside_of_the_model_are_made_equal_too():
    """As a temperature, or weights of several losses, that each rank has drawn for itself."""

    def work(world):
        model, outside = nn.Linear(2, 1), nn.Parameter(torch.full((3,), float(world.rank)))
        optimizer = world.wrap(torch.optim.SGD([*model.parameters(), outside], lr=0.1), model)
        world.broadcast_state(model, optimizer)
        return outside.tolist()

    assert run_ranks(2, work) == [[0.0] * 3] * 2


def test_a_gradient_that_ends_in_a_collective_is_told_once(caplog, monkeypatch):
    monkeypatch.setattr(carriers, "_said", set())

    def work(world):
        model = nn.Linear(2, 3)
        loss = model(torch.ones(4, 2)).square().mean()
        world.all_reduce(loss, "mean", "shown")  # a single number is looked at
        world.broadcast(model.weight, "weight")
        world.all_gather(model(torch.ones(4, 2)).detach(), "meant")
        for _ in range(2):
            gathered = world.all_gather(model(torch.ones(4, 2)), "features")
        return gathered.requires_grad

    assert run_ranks(2, work) == [False, False]
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        "no gradient flows through World.all_gather()"
    ]
    assert "hvdtrain.compat.horovod.allgather()" in caplog.text


def test_frequencies_of_a_ranks_own_are_told(caplog):
    model = nn.Sequential(nn.Embedding(5, 2, scale_grad_by_freq=True))
    run_ranks(2, lambda world: world.wrap(sgd(model), model) and None)
    assert "Embedding(scale_grad_by_freq=True) 0 divides by how often" in caplog.text
