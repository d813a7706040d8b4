"""What `World` is given by loops of users' own: other objects, parameters of nobody's model, names that are taken."""

import warnings

import pytest
import torch
from thread_world import run_ranks
from torch import nn

from hvdtrain.errors import ConfigError, DivergedError, UsageError
from hvdtrain.process.launch import Launch
from hvdtrain.world import SoloWorld, carriers

SOLO = SoloWorld(torch.device("cpu"), Launch("none"))


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (
            lambda model, optimizer: SOLO.wrap(model, optimizer),
            "wrap\\(optimizer, model\\) was given .* type SGD as the model",
        ),
        (lambda model, optimizer: SOLO.wrap(model, model), "type Linear as the optimizer"),
        (lambda model, optimizer: SOLO.wrap(optimizer, [model, model]), r"one as torch.nn.ModuleList\(\[...\]\)"),
        (lambda model, optimizer: SOLO.wrap(optimizer, model.parameters()), "give the torch.nn.Module itself"),
        (lambda model, optimizer: SOLO.wrap(optimizer, None), "of type NoneType as the model"),
        (lambda model, optimizer: SOLO.broadcast_state(optimizer), "broadcast_state\\(model, optimizer\\) was given"),
        (lambda model, optimizer: SOLO.broadcast_state(model, model), "type Linear as the optimizer"),
        (lambda model, optimizer: SOLO.average_buffers([model]), "average_buffers\\(model\\) was given"),
        (lambda model, optimizer: SOLO.wrap(optimizer, model, 4), "as accum_steps=4, or an Averaging"),
        (lambda model, optimizer: SOLO.wrap(optimizer, nn.LazyLinear(2)), "weight has no shape yet"),
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
    assert "all_gather(..., differentiable=True) let gradients through" in caplog.text


def test_frequencies_of_a_ranks_own_are_told(caplog):
    model = nn.Sequential(nn.Embedding(5, 2, scale_grad_by_freq=True))
    run_ranks(2, lambda world: world.wrap(sgd(model), model) and None)
    assert "Embedding(scale_grad_by_freq=True) 0 divides by how often" in caplog.text


def weights_of(work, size=2):
    """Return what plain torch makes of the whole batch, and what each rank does of its share of it."""
    return work(None), run_ranks(size, work)


def share(world, tensor):
    return tensor if world is None else tensor[world.rank :: world.size]


def wrapped(world, optimizer, model, **fields):
    return optimizer if world is None else world.wrap(optimizer, model, **fields)


def line(*layers):
    generator, model = torch.Generator().manual_seed(0), nn.Sequential(*layers).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("passes", [1, 2, 3])
def test_what_is_frozen_between_its_backward_pass_and_the_step_is_averaged(passes):
    """In windows that end with the last of four passes, or before it; laid out anew after each step."""

    def work(world):
        model = line(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        optimizer = wrapped(world, sgd(model), model, accum_steps=4 if passes < 3 else 3)
        for step in range(4):
            model.requires_grad_(True)
            optimizer.zero_grad()
            for number in range(passes):
                x = torch.linspace(-1, 1, 24, dtype=torch.float64).view(8, 3).roll(step + number, 0)
                model(share(world, x)).square().mean().backward()
                if number == 0:
                    model[0].requires_grad_(False)
            optimizer.step()
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    alone, ranks = weights_of(work)
    for ours in ranks:
        assert (ours - alone).abs().max() < 1e-12


def test_rows_of_a_table_that_is_tied_to_a_layer():
    """Sparse and dense gradients add up to a dense one, which AdamW takes."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(7, 3, sparse=True)

        def forward(self, tokens):
            return self.table(tokens) @ self.table.weight.t()

    def work(world):
        model = Tied().double()
        with torch.no_grad():
            model.table.weight.copy_(torch.linspace(-1, 1, 21, dtype=torch.float64).view(7, 3))
        optimizer = wrapped(world, torch.optim.AdamW(model.parameters(), lr=0.1), model)
        for step in range(4):
            tokens = torch.arange(8).roll(step).remainder(7)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(share(world, tokens)), share(world, tokens.roll(1))).backward()
            optimizer.step()
        return model.table.weight.detach()

    alone, ranks = weights_of(work)
    for ours in ranks:
        assert (ours - alone).abs().max() < 1e-12


def test_a_step_that_takes_something_else_than_a_closure():
    class Scaled(torch.optim.SGD):
        def step(self, scale=None):
            for parameter in self.param_groups[0]["params"]:
                parameter.grad.mul_(scale)
            return super().step()

    def work(world):
        model = line(nn.Linear(3, 1))
        optimizer = wrapped(world, Scaled(model.parameters(), lr=0.1), model)
        x = torch.linspace(-1, 1, 24, dtype=torch.float64).view(8, 3)
        model(share(world, x)).square().mean().backward()
        optimizer.step(torch.tensor(0.5))
        return model[0].weight.detach()

    alone, ranks = weights_of(work)
    for ours in ranks:
        assert (ours - alone).abs().max() < 1e-12


@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr"])
def test_sparse_buffers_are_compared(layout):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a layout "in beta state"
        kinds = [getattr(torch.eye(3) * factor, layout)() for factor in (1, 2)]

    def work(world, differs):
        model = nn.Linear(2, 1)
        model.weight.data.fill_(world.rank)
        model.register_buffer("edges", kinds[world.rank * differs], persistent=False)
        world.broadcast_state(model)
        return model.weight.sum().item()

    assert run_ranks(2, lambda world: work(world, False)) == [0.0, 0.0]
    with pytest.raises(DivergedError, match="edges on rank 1 differs"):
        run_ranks(2, lambda world: work(world, True))


@pytest.mark.slow
def test_a_training_step_that_is_compiled_as_a_whole():
    """`torch.compile` of the function around backward and step: averaging is left out of it."""

    def work(world):
        model = line(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        optimizer = wrapped(world, sgd(model), model)

        @torch.compile(backend="eager")
        def step(x):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            return loss

        for number in range(3):
            step(share(world, torch.linspace(-1, 1, 24, dtype=torch.float64).view(8, 3).roll(number, 0)))
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    # Ranks are threads here, and share what is compiled.
    with warnings.catch_warnings(), torch._dynamo.config.patch(recompile_limit=100):
        warnings.simplefilter("ignore")  # of the compiler's own
        alone, ranks = weights_of(work)
    for ours in ranks:
        assert (ours - alone).abs().max() < 1e-12
