"""`--optim.shard`: every optimizer, on 2 to 4 ranks in fp64, does what it does undivided, with a part of the state."""

import copy

import pytest
import torch
from thread_world import ThreadWorld, run_ranks
from torch import nn

from hvdtrain.data.dataset import TensorSamples
from hvdtrain.errors import ConfigError, UsageError
from hvdtrain.models.walk import owned_by
from hvdtrain.optim.divisible import divisions
from hvdtrain.optim.table import OPTIMIZERS, settings_class
from hvdtrain.optim.torch_class import torch_optimizers
from hvdtrain.settings import CommConfig, Config, HealthConfig, LogConfig, TrainConfig
from hvdtrain.trainer import Task, train_step
from hvdtrain.trainer.ema import WeightAverage
from hvdtrain.trainer.local_updates import strategy_of
from hvdtrain.trainer.memory import estimate
from hvdtrain.trainer.rehearsal import rehearse
from hvdtrain.trainer.scaler import LossScaler
from hvdtrain.trainer.state import start_training
from hvdtrain.trainer.unfreezing import GradualUnfreezing
from hvdtrain.world.pieces import cut_for
from hvdtrain.world.sharded_buckets import IN_FLIGHT

NAMES = [*OPTIMIZERS, *torch_optimizers()]
STEPS = 5


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(12), nn.Linear(12, 12)

    def forward(self, x):
        return x + self.linear(self.norm(x)).tanh()


def network():
    """Matrices, vectors, a convolution that does not lie in its logical order, and a parameter without dimensions."""
    model = nn.Sequential(
        nn.Conv2d(2, 3, 2), nn.Flatten(), Block(), Block(), nn.Linear(12, 5), nn.PReLU(1), nn.Linear(5, 1)
    )
    model = model.to(memory_format=torch.channels_last)
    model.scale = nn.Parameter(torch.ones(()))
    return model


torch.manual_seed(0)
MODEL = network()
X = torch.randn(26, 2, 3, 3, generator=torch.Generator().manual_seed(1))
Y = X.sin().flatten(1).sum(1, keepdim=True)


def task_of(bad=(), callbacks=(), model=MODEL):
    x = X.clone()
    x[list(bad)] = torch.nan

    def loss_sums(model, batch):
        scale = model.scale.to(batch[1].dtype)
        return {"loss": (model(batch[0]) * scale - batch[1]).square().sum()}

    data = TensorSamples(x, Y)
    return Task(model=model, train_data=data, val_data=data, loss_sums=loss_sums, callbacks=list(callbacks))


def settings(shard, name="adamw", train=None, **sections):
    train = {"precision": "fp64", "global_batch_size": 12, "max_grad_norm": 0.5, **(train or {})}
    optim = sections.pop("optim", {})
    optim = settings_class(name)(name=name, peak_lr=0.01, shard=shard, **optim)
    return Config(
        train=TrainConfig(**train), optim=optim, comm=sections.pop("comm", CommConfig(bucket_mib=1)), **sections
    )


def trained(world, config, task=None, steps=STEPS):
    """Return a training after some steps, and its metrics."""
    job = rehearse(task or task_of(), config, world, num_steps=20)
    training = start_training(job)
    for _ in range(steps):
        train_step(job, training)
    metrics = {}
    for component in training.components:
        metrics.update(component.metrics(training))
    return job, training, metrics


def weights_of(training):
    weights = {name: p.detach().double() for name, p in training.model.named_parameters()}
    average = training.component(WeightAverage)
    return {
        **weights,
        **{f"ema.{name}": t.double() for name, t in (average.evaluated_weights() if average else {}).items()},
    }


def both(size, make, task=task_of, world_of=lambda world: world):
    """Return the largest difference between a sharded training and one that is not, and their metrics."""

    def work(shard):
        def of_rank(world):
            _, training, metrics = trained(world_of(world), make(shard), task())
            return weights_of(training), metrics

        return run_ranks(size, of_rank)

    plain, sharded = work(False), work(True)
    assert all(tensor.equal(sharded[0][0][name]) for weights, _ in sharded for name, tensor in weights.items())
    assert (plain[0][0]["2.linear.weight"] - MODEL[2].linear.weight.double()).abs().max() > 1e-6  # it has moved
    difference = max((plain[0][0][name] - tensor).abs().max().item() for name, tensor in sharded[0][0].items())
    return difference, plain[0][1], sharded[0][1]


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_does_what_it_does_undivided(name):
    """With clipping, groups that decay and others, accumulation, a skipped step and a moving average."""
    optim = {"momentum": 0.9} if name == "sgd" else {}
    train = {"ema": 0.5, "accum_steps": 2}

    def make(shard):
        return settings(shard, name, train, optim=optim)

    difference, plain, sharded = both(3, make, lambda: task_of(bad=[7]))
    assert difference < 1e-12
    assert sharded["train/skipped_steps"] == plain["train/skipped_steps"] == 2


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", ["adamw", "muon", "lamb"])
def test_on_other_numbers_of_ranks(size, name):
    assert both(size, lambda shard: settings(shard, name))[0] < 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_ranks_that_have_nothing_of_a_group_or_nothing_at_all_go_along(name):
    """A model of a few numbers on four ranks, and a group in which nothing learns."""

    torch.manual_seed(0)
    tiny = nn.Sequential(nn.Flatten(), nn.Linear(18, 1, bias=False), nn.Linear(1, 1), nn.Linear(1, 1))
    tiny[3].requires_grad_(requires_grad=False)

    def build(optim, model):
        *_, first, second, frozen = model
        optimizer = settings_class(name)(name=name, peak_lr=0.01).build(nn.ParameterList([first.weight, second.weight]))
        for group in ([second.bias], [*frozen.parameters()]):
            optimizer.add_param_group({"params": group})
        return optimizer

    def work(size, shard):
        def of_rank(world):
            data = TensorSamples(X, Y)
            task = Task(
                model=copy.deepcopy(tiny),
                train_data=data,
                val_data=data,
                loss_sums=lambda model, batch: {"loss": (model(batch[0]) - batch[1]).square().sum()},
                build_optimizer=build,
            )
            return weights_of(trained(world, settings(shard, name), task, steps=3)[1])

        return run_ranks(size, of_rank)

    (alone,) = work(1, shard=False)
    for size, shard in ((2, False), (4, True)):
        for weights in work(size, shard):
            assert max((alone[key] - tensor).abs().max().item() for key, tensor in weights.items()) < 1e-12


def test_without_clipping_it_is_bitwise():
    """Each number is added, and moved, in the same order."""
    difference, *_ = both(3, lambda shard: settings(shard, "sgd", {"max_grad_norm": None}, optim={"momentum": 0.9}))
    assert difference == 0


def test_layers_that_are_frozen_and_learn_later():
    task = lambda: task_of(callbacks=[GradualUnfreezing({"2": 2, "0": 3})])  # noqa: E731
    assert both(3, lambda shard: settings(shard), task)[0] < 1e-12


@pytest.mark.parametrize(("precision", "compression"), [("fp16", "none"), ("bf16-true", "none"), ("fp32", "fp16")])
def test_other_types(precision, compression):
    train = {"precision": precision}
    comm = CommConfig(compression=compression)
    difference, *_ = both(2, lambda shard: settings(shard, train=train, comm=comm))
    assert difference < (1e-2 if precision == "bf16-true" else 1e-5)


class Overflowing(nn.Module):
    """So few weights that some ranks have none; the second step's gradient of one of them is infinite."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.calls = nn.Linear(18, 1), nn.Linear(1, 1), 0

    def forward(self, x):
        self.calls += 1
        weight = self.last.weight * 1
        if self.calls == 2:
            weight.register_hook(lambda gradient: gradient * torch.inf)
        return nn.functional.linear(self.first(x.flatten(1)), weight, self.last.bias)


def test_the_loss_scale_moves_alike_whichever_rank_has_the_part_that_overflows():
    """Each would go by its own part; who has none would have nothing to go by."""

    def loss_sums(model, batch):
        return {"loss": (model(batch[0]) - batch[1]).square().sum() * 1e-3}

    def work(world):
        data = TensorSamples(X, Y)
        task = Task(model=Overflowing(), train_data=data, val_data=data, loss_sums=loss_sums)
        _, training, metrics = trained(world, settings(True, train={"precision": "fp16"}), task)
        assert metrics["train/skipped_steps"] == 1
        return len(owned_by(training.optimizer)), training.component(LossScaler).scale

    pieces, scales = zip(*run_ranks(4, work), strict=True)
    assert 0 in pieces
    assert set(scales) == {2.0**15}


class AskedLater(ThreadWorld):
    """Ranks on what cannot be looked at without waiting, as GPUs are."""

    reads_at_once = False


def test_fused_optimizers_skip_by_themselves():
    def later(world):
        world.__class__ = AskedLater
        return world

    difference, plain, sharded = both(2, lambda shard: settings(shard), lambda: task_of(bad=[7]), later)
    assert difference < 1e-12
    assert sharded["train/skipped_steps"] == plain["train/skipped_steps"] == 2


def test_figures_of_gradients_are_those_of_the_whole():
    log, health = LogConfig(grad_norms=True), HealthConfig(noise_scale=True)
    _, plain, sharded = both(3, lambda shard: settings(shard, log=log, health=health))
    names = [name for name in plain if name.startswith(("grad_norm/", "train/grad", "train/noise"))]
    assert {name.partition("/")[0] for name in names} == {"grad_norm", "train"}
    assert len(names) > 6
    for name in names:
        assert sharded[name] == pytest.approx(plain[name], rel=1e-6)


def states_of(size, shard, name, steps=STEPS, begin=None):
    """Return the whole state of the optimizer after some steps on every rank, from a state that rank 0 has read."""

    def work(world):
        job, training, _ = trained(world, settings(shard, name), steps=0 if begin else steps)
        if begin is not None:
            own = job.strategy.part_of_state(world, training, begin if world.rank == 0 else None)
            training.optimizer.load_state_dict(own)
        return job.strategy.optimizer_state(world, training)

    return run_ranks(size, work)


def same(one, other, tolerance=0.0):
    """Tell whether two states are alike: numbers, keys, shapes and types."""
    assert one.keys() == other.keys()
    assert [{**group} for group in one["param_groups"]] == [{**group} for group in other["param_groups"]]
    assert one["state"].keys() == other["state"].keys()
    for number, entries in one["state"].items():
        assert entries.keys() == other["state"][number].keys()
        for key, value in entries.items():
            twin = other["state"][number][key]
            if isinstance(value, torch.Tensor):
                assert (value.shape, value.dtype) == (twin.shape, twin.dtype)
                assert (value.double() - twin.double()).abs().max() <= tolerance
            else:
                assert value == twin
    return True


@pytest.mark.parametrize("name", ["adamw", "muon", "Adafactor", "NAdam", "Adagrad"])
def test_a_checkpoint_holds_the_undivided_state_and_loads_on_any_number_of_ranks(name):
    (whole, *_), (saved, *others) = states_of(3, False, name), states_of(3, True, name)
    assert others == [{}, {}]
    assert same(saved, whole, 1e-12)
    for size, shard in ((4, True), (2, True), (1, False)):
        assert same(states_of(size, shard, name, begin=saved)[0], saved)
    assert same(states_of(3, True, name, begin=whole)[0], whole)


def test_a_state_of_another_model_is_refused():
    (saved, *_) = states_of(2, True, "adamw")
    saved["param_groups"][0]["params"].pop()
    with pytest.raises(ValueError, match="parameter group"):
        states_of(2, True, "adamw", begin=saved)


def wide_task():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(12, 500), nn.Tanh(), nn.Linear(500, 400))
    model = nn.Sequential(*model, nn.Tanh(), nn.Linear(400, 1))
    model.scale = nn.Parameter(torch.ones(()))
    return task_of(model=model)


def test_the_state_of_a_rank_is_its_share_and_the_estimate_knows_it():
    """AdamW's on 4 ranks: a quarter, within 5 % (here 1 %)."""
    task = wide_task()
    parameters = sum(parameter.numel() for parameter in task.model.parameters())

    def work(world):
        job, training, _ = trained(world, settings(True), task, steps=1)
        entries = [value for state in training.optimizer.state.values() for value in state.values()]
        return sum(value.nbytes for value in entries), estimate(job)

    for held, expected in run_ranks(4, work):
        assert held == pytest.approx(2 * 8 * parameters / 4, rel=0.01)
        assert expected.optimizer == pytest.approx(held, rel=0.01)


def test_gradients_are_freed_as_they_leave():
    """Within backward, never more than a few buckets are on the wire, and no parameter keeps a gradient."""

    def work(world):
        model = nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(8)))
        optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model, shard=True, bucket_bytes=1)
        buckets, most, kept = optimizer._exchange.layout.buckets, [], []

        def note(parameter):
            most.append(sum(bucket._wait is not None for bucket in buckets))
            kept.append(sum(p.grad is not None for p in model.parameters()))

        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(note)
        for _ in range(2):
            most.clear(), kept.clear()  # the first pass learns how often it adds to a gradient, and sends at its end
            model(torch.ones(1, 3)).sum().backward()
            optimizer.step()
        return max(most), max(kept), [name for name in world.sent if name.endswith(("weight", "tail"))]

    (in_flight, kept, sent), other = run_ranks(2, work)
    assert other == (in_flight, kept, sent)
    assert (in_flight, kept) == (IN_FLIGHT, 0)
    reduced = [name for name in sent if "moved" not in name]
    assert reduced == 2 * [*(f"gradients.1.{i}.weight" for i in range(7, -1, -1)), "gradients.1.tail"]


class Coupled(torch.optim.SGD):
    """Steps by the norm of all its gradients."""

    def step(self, closure=None):
        size = torch.stack([p.grad.norm() for group in self.param_groups for p in group["params"]]).sum()
        for group in self.param_groups:
            for p in group["params"]:
                p.data.sub_(p.grad / size)


@pytest.mark.parametrize("name", NAMES)
def test_a_parameter_without_numbers_is_no_matter_for_any_optimizer(name):
    model = network()
    model.rows, model.none = nn.Parameter(torch.zeros(0, 4)), nn.Parameter(torch.zeros(0))
    optimizer = settings_class(name)(name=name).build(model)
    before = model[0].weight.clone()
    (model(X).sum() + model.rows.sum() + model.none.sum()).backward()
    optimizer.step()
    assert not model[0].weight.equal(before)


class Noisy(torch.optim.SGD):
    """Adds noise to its gradients, as Langevin dynamics do."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.data.sub_(p.grad + torch.randn_like(p))


def test_how_far_an_optimizer_can_be_divided_is_found_by_trying_it():
    found = {name: divisions(settings_class(name)(name=name).build(MODEL)) for name in NAMES}
    assert found["adamw"] == found["sgd"] == found["Rprop"] == ["elements", "elements"]
    assert found["muon"] == ["parameters", "elements", "elements"]
    assert found["lars"] == found["lamb"] == ["parameters", "elements"]  # vectors, without decay, take the plain step
    assert found["Adafactor"] == ["parameters", "parameters"]
    assert not any("none" in one for one in found.values())
    for kind in (Coupled, Noisy, torch.optim.LBFGS):
        assert divisions(kind(MODEL.parameters(), lr=0.1)) == ["none"]


def refused(says, work):
    def guarded(world):
        with pytest.raises(ConfigError, match=says):
            work(world)

    run_ranks(2, guarded)


def test_what_cannot_be_sharded_is_refused():
    def wrap(kind=torch.optim.SGD, model=MODEL, **options):
        return lambda world: world.wrap(kind(model.parameters(), lr=0.1), model, shard=True, **options)

    refused("Coupled: a parameter's step there depends on other", wrap(Coupled))
    refused("adasum needs whole gradients", wrap(op="adasum"))
    refused("--comm.compression bf16 does not send them as one sum", wrap(compression="bf16"))
    refused("dense gradients", wrap(model=nn.Embedding(3, 2, sparse=True)))
    refused("takes no further parameters", lambda world: wrap()(world).add_param_group({"params": []}))
    with pytest.raises(ConfigError, match=r"--optim\.shard needs what all ranks share in each step"):
        strategy_of(settings(True, comm=CommConfig(sync="local")), 2)


def test_a_model_that_is_converted_afterwards_is_said():
    def work(world):
        model = nn.Linear(3, 1)
        optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model, shard=True)
        model.double()
        with pytest.raises(RuntimeError, match="converted"):
            model(torch.ones(1, 3).double()).sum().backward()
        del optimizer

    run_ranks(2, work)


@pytest.mark.parametrize("clears", ["optimizer", "model", "parameters"])
def test_in_a_loop_of_ones_own_it_is_the_undivided_step_whoever_clears_gradients(clears):
    """Also where a layer has no gradient any more, and what is broadcast is the model alone."""
    torch.manual_seed(0)
    begin = nn.Sequential(nn.Linear(3, 40), nn.Tanh(), nn.Linear(40, 41), nn.Linear(41, 1)).double()
    x = torch.randn(12, 3, dtype=torch.float64)

    def work(world, shard):
        model = copy.deepcopy(begin)
        optimizer = world.wrap(torch.optim.AdamW(model.parameters(), lr=0.01), model, shard=shard)
        if shard:
            with pytest.raises(UsageError, match="another part of its state on each rank"):
                world.broadcast_state(model, optimizer)
        world.broadcast_state(model)
        for step in range(6):
            if step == 3:
                model[2].requires_grad_(requires_grad=False)
            for part in (0, 1):  # two passes are added up
                model(x[2 * world.rank + part :: 4]).square().mean().backward()
            optimizer.step()
            if clears == "parameters":
                for parameter in model.parameters():
                    parameter.grad = None
            else:
                {"optimizer": optimizer, "model": model}[clears].zero_grad()
        return [parameter.detach() for parameter in model.parameters()]

    plain, sharded = (run_ranks(2, lambda world, shard=shard: work(world, shard))[0] for shard in (False, True))
    assert all(torch.allclose(a, b, rtol=0, atol=1e-14) for a, b in zip(plain, sharded, strict=True))


def test_whole_parameters_go_where_least_is():
    parameters = [nn.Parameter(torch.zeros(n, 10)) for n in (7, 1, 2, 3, 4, 5)]
    cuts = cut_for(2, parameters, dict.fromkeys(parameters, "parameters"), 1 << 20)
    assert [sum(cut.lengths[rank] for cut in cuts) for rank in range(2)] == [110, 110]
    for cut in cuts:
        owners = [part.parameter for rank in range(2) for part, _ in cut.parts(rank)]
        assert sorted(map(id, owners)) == sorted(map(id, cut.parameters))
