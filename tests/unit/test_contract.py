"""A recipe's contract: broken ones are told in one sentence at their first batch, healthy ones notice nothing."""

import copy
import dataclasses
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from thread_world import run_ranks
from torch import nn

from hvdtrain import Recipe, Task, TensorSamples, TrainConfig
from hvdtrain.errors import UsageError
from hvdtrain.process.launch import Launch
from hvdtrain.rundir.directory import RunDirectory
from hvdtrain.rundir.log import MetricLog
from hvdtrain.settings import Config, EvalConfig, LogConfig
from hvdtrain.trainer import fit, settle, step, train_step
from hvdtrain.trainer.contract import check_loss, first_batch
from hvdtrain.trainer.evaluation import evaluate
from hvdtrain.trainer.state import start_training
from hvdtrain.world import SoloWorld

SOLO = SoloWorld(torch.device("cpu"), Launch("none"))


def samples(n=32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 6, generator=generator)
    return TensorSamples(x, (x.sum(1) > 0).long())


def network(*, norm=None, dropout=0.0):
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8), *([norm] if norm else []), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 2)]
    return nn.Sequential(*layers)


def cross_entropy(model, batch):
    x, y = batch
    return {"loss": F.cross_entropy(model(x), y, reduction="sum")}


def task(loss=cross_entropy, model=None, data=None, **more):
    held_out = samples(8) if data is None or len(data) == 0 else data
    data = samples() if data is None else data
    return Task(model=model or network(), train_data=data, val_data=held_out, loss_sums=loss, **more)


def train(made, tmp_path, steps=2, **settings):
    config = Config(train=TrainConfig(steps=steps, global_batch_size=8), log=LogConfig(every=1), **settings)
    job = settle(made, config, SOLO, RunDirectory(tmp_path), MetricLog(None, []))
    fit(job)
    return [parameter.detach().clone() for parameter in made.model.parameters()]


class Padded(TensorSamples):
    """Texts of different length, padded to the longest of a batch, one target a token that is none of padding."""

    def __init__(self):
        generator = torch.Generator().manual_seed(1)
        super().__init__(
            torch.randint(1, 9, (32, 7), generator=generator), torch.randint(1, 8, (32,), generator=generator)
        )

    def batch(self, indices):
        tokens, lengths = super().batch(indices)
        width = int(lengths.max())
        mask = torch.arange(width) < lengths[:, None]
        return tokens[:, :width] * mask, mask

    def num_targets(self, indices):
        return int(self.tensors[1][indices].sum())


def padded_sum(model, batch):
    tokens, mask = batch
    return {"loss": (F.cross_entropy(model(tokens).transpose(1, 2), tokens, reduction="none") * mask).sum()}


def padded_mean(model, batch):
    return {"loss": padded_sum(model, batch)["loss"] / batch[1].sum()}


def language():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 9))


def with_accuracy(model, batch):
    x, y = batch
    scores = model(x)
    return {"loss": F.cross_entropy(scores, y, reduction="sum"), "accuracy": (scores.argmax(1) == y).sum()}


def contrastive(model, batch):
    x, _ = batch
    z = F.normalize(model(x), dim=1)
    return {"loss": F.cross_entropy(z @ z.T, torch.arange(len(z)), reduction="sum")}


def pairs(model, batch):
    x, _ = batch
    left, right = model(x).view(-1, 2, 2).unbind(1)
    return {"loss": (left - right).square().sum()}


HEALTHY = {
    "plain": task,
    "dropout": lambda: task(model=network(dropout=0.5)),
    "batch norm": lambda: task(model=network(norm=nn.BatchNorm1d(8))),
    "batch norm without statistics": lambda: task(model=network(norm=nn.BatchNorm1d(8, track_running_stats=False))),
    "layer norm": lambda: task(model=network(norm=nn.LayerNorm(8))),
    "padding": lambda: task(padded_sum, language(), Padded(), unit="tokens"),
    "accuracy": lambda: task(with_accuracy, metrics=("loss", "accuracy")),
    "contrastive": lambda: task(contrastive),
    "pairs": lambda: task(pairs),
    "zero": lambda: task(lambda model, batch: {"loss": 0 * model(batch[0]).sum()}),
    "negative": lambda: task(lambda model, batch: {"loss": -model(batch[0]).log_softmax(1).exp().sum()}),
    "random": lambda: task(lambda model, batch: {"loss": model(batch[0] + torch.randn_like(batch[0])).square().sum()}),
    "squared": lambda: task(lambda model, batch: {"loss": model(batch[0]).square().sum() * 1e-30}),
    "one element": lambda: task(lambda model, batch: {"loss": cross_entropy(model, batch)["loss"][None]}),
}


@pytest.mark.parametrize("name", [name for name in HEALTHY if name != "one element"])
def test_healthy_recipes_train_bitwise_as_without_the_check(name, tmp_path, monkeypatch):
    with_check = train(HEALTHY[name](), tmp_path / "a")
    calls = []
    monkeypatch.setattr(step, "first_batch", lambda job, model, samples, read, forward: calls.append(1) or read())
    without = train(HEALTHY[name](), tmp_path / "b")
    assert calls == [1]
    assert all(torch.equal(a, b) for a, b in zip(with_check, without, strict=True))


def ragged():
    class Ragged(TensorSamples):
        def batch(self, indices):
            return (torch.stack([torch.zeros(3 + int(i) % 2) for i in indices]),)

    return Ragged(torch.zeros(32))


def returning(make):
    class Odd(TensorSamples):
        def batch(self, indices):
            return make(super().batch(indices))

    return Odd(*samples().tensors)


def mean(model, batch):
    return {"loss": F.cross_entropy(model(batch[0]), batch[1])}


def half_mean(model, batch):
    x, y = batch
    scores = model(x)
    return {"loss": F.cross_entropy(scores, y, reduction="sum"), "accuracy": (scores.argmax(1) == y).float().mean()}


BROKEN = {
    "a tensor": (lambda: task(lambda m, b: cross_entropy(m, b)["loss"]), "loss_sums returned a Tensor: return a dict"),
    "nothing": (lambda: task(lambda m, b: None), "loss_sums returned a NoneType"),
    "missing": (lambda: task(metrics=("loss", "accuracy")), "names 'accuracy' too"),
    "no loss": (lambda: task(metrics=("accuracy",)), "one of them must be 'loss'"),
    "a number": (lambda: task(lambda m, b: {"loss": cross_entropy(m, b)["loss"].item()}), "without .item()"),
    "a vector": (lambda: task(lambda m, b: {"loss": m(b[0]).sum(1)}), r"of shape \(\d+,\) as 'loss': return one"),
    "detached": (lambda: task(lambda m, b: {"loss": cross_entropy(m, b)["loss"].detach()}), "depend on the weights"),
    "mean": (lambda: task(mean), "returns a mean as 'loss'"),
    "mean with dropout": (lambda: task(mean, network(dropout=0.5)), "returns a mean as 'loss'"),
    "mean with batch norm": (lambda: task(mean, network(norm=nn.BatchNorm1d(8))), "returns a mean as 'loss'"),
    "mean over padding": (lambda: task(padded_mean, language(), Padded()), "returns a mean as 'loss'"),
    "mean accuracy": (lambda: task(half_mean, metrics=("loss", "accuracy")), "returns a mean as 'accuracy'"),
    "empty": (lambda: task(data=samples(0)), "train_data is empty"),
    "ragged": (lambda: task(data=ragged()), r"samples \d+ and \d+ differ in shape"),
    "text": (lambda: task(data=returning(lambda b: "text")), "returned a str without tensors"),
    "numbers": (lambda: task(data=returning(lambda b: b[0].tolist())), "returned a list without tensors"),
    "arrays": (lambda: task(data=returning(lambda b: (b[0].numpy(), b[1]))), "a numpy array .* torch.from_numpy"),
    "other rows": (lambda: task(data=returning(lambda b: (b[0].T, b[1]))), "its first dimension must be"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_recipes_are_told_before_the_first_step(name, tmp_path):
    make, says = BROKEN[name]
    with pytest.raises(UsageError, match=says) as caught:
        train(make(), tmp_path)
    assert len(str(caught.value).splitlines()) == 1


def test_nothing_is_disturbed():
    model = nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 2))
    model[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def forward(batch):
        random.random()
        np.random.rand()
        torch.rand(1)
        model[0].running_mean += 1
        return cross_entropy(model, batch)

    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    check_loss(task(model=model), model, samples().batch(torch.arange(5)), forward)
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert [module.training for module in model.modules()] == [True, True, False, True]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_optimizer_of_the_recipes_own(tmp_path):
    built = []

    def build(optim, model):
        built.append(torch.optim.Adagrad(model.parameters(), lr=optim.peak_lr))
        return built[0]

    train(task(build_optimizer=build), tmp_path)
    assert len(built) == 1
    assert all(state["step"] == 2 for state in built[0].state.values())


def test_a_recipe_names_what_it_lacks():
    with pytest.raises(NotImplementedError, match="has no method build"):
        Recipe().build(print)


def test_batches_of_other_forms_train_alike(tmp_path):
    """Lists, dictionaries and what torch's default_collate makes of samples: the same weights as from a tuple."""

    def named(model, batch):
        return cross_entropy(model, (batch["x"], batch["more"][0]))

    wanted = train(task(), tmp_path / "tuple")
    data = samples()
    single = [{"x": x, "more": [y]} for x, y in zip(*data.tensors, strict=True)]
    cases = {
        "list": task(data=returning(list)),
        "dictionary": task(named, data=returning(lambda b: {"x": b[0], "more": [b[1]]})),
        "samples": task(named, data=single),
        "pairs": task(data=torch.utils.data.TensorDataset(*data.tensors)),
        "collated": task(
            data=list(zip(*data.tensors, strict=True)), collate=lambda s: tuple(map(torch.stack, zip(*s, strict=True)))
        ),
    }
    for name, made in cases.items():
        assert all(map(torch.equal, train(made, tmp_path / name), wanted)), name
    with pytest.raises(UsageError, match="returns a mean as 'loss'"):
        train(task(mean, data=torch.utils.data.TensorDataset(*data.tensors)), tmp_path / "mean")


def test_a_run_that_goes_on_is_checked_too(tmp_path):
    train(task(), tmp_path)
    with pytest.raises(UsageError, match="returns a mean as 'loss'"):
        train(task(mean), tmp_path, steps=4)


def test_a_step_in_which_a_rank_has_no_samples_is_not_the_one_that_is_checked(tmp_path):
    """As the last of an epoch, with which a run may go on: all ranks check together."""

    def work(world):
        config = Config(train=TrainConfig(steps=4, global_batch_size=8), log=LogConfig(every=1))
        job = settle(task(data=samples(9)), config, world, RunDirectory(tmp_path), MetricLog(None, []))
        training = start_training(dataclasses.replace(job, directory=None))
        training.is_unchecked, training.step = True, 1
        found = []
        for _ in range(2):
            train_step(job, training)
            found.append(training.is_unchecked)
        return found

    assert run_ranks(2, work) == [[True, False]] * 2


MEANS = {
    "samples": (lambda model, batch: {"loss": F.cross_entropy(model(batch[0]), batch[1])}, cross_entropy, task),
    "padded texts": (padded_mean, padded_sum, lambda loss, **more: task(loss, language(), Padded(), **more)),
}


@pytest.mark.parametrize("name", MEANS)
def test_means_are_weighted_by_their_targets(name, tmp_path):
    """In micro-batches of unequal numbers of targets, and in evaluations whose last batch is short."""
    mean, total, made = MEANS[name]

    def figures(world, loss, **more):
        train = TrainConfig(steps=3, global_batch_size=12, micro_batch_size=3, precision="fp64")
        config = Config(train=train, log=LogConfig(every=1), eval=EvalConfig(batch_size=5))
        job = settle(made(loss, **more), config, world, RunDirectory(tmp_path), MetricLog(None, []))
        training = start_training(job)
        for _ in range(3):
            train_step(job, training)
        weights = torch.cat([parameter.detach().view(-1) for parameter in training.model.parameters()])
        return weights, evaluate(job, training)["val/loss"]

    weights, held_out = figures(SOLO, total)
    found, loss = figures(SOLO, mean, reduction="mean")
    torch.testing.assert_close(found, weights, rtol=1e-12, atol=1e-12)
    assert loss == pytest.approx(held_out, rel=1e-12)


def test_a_sum_where_a_mean_is_promised(tmp_path):
    with pytest.raises(UsageError, match=r"returns a sum as 'loss'.*reduction='mean'"):
        train(task(cross_entropy, reduction="mean"), tmp_path)
    with pytest.raises(UsageError, match=r"Or say so: Task\(reduction='mean'\)"):
        train(task(padded_mean, language(), Padded()), tmp_path)


def test_what_one_rank_finds_all_ranks_tell(tmp_path):
    made = task()

    def work(world):
        config = Config(train=TrainConfig(steps=2, global_batch_size=8), log=LogConfig(every=1))
        job = settle(made, config, world, RunDirectory(tmp_path), MetricLog(None, []))
        batch = made.train_data.batch(torch.arange(4))
        read = (lambda: ()) if world.rank == 1 else (lambda: batch)
        try:
            first_batch(job, made.model, torch.arange(4), read, lambda batch: cross_entropy(made.model, batch))
        except UsageError as error:
            return str(error), error.is_on_all_ranks
        return None

    first, second = run_ranks(2, work)
    assert first == second
    assert first[0].startswith("on rank 1: TensorSamples.batch returned a tuple without tensors")
    assert first[1]


def test_an_optimizer_over_what_is_not_the_models_is_refused(tmp_path):
    """It would be in no checkpoint, and random on every rank."""
    temperature = nn.Parameter(torch.ones(1))

    def build(optim, model):
        return torch.optim.SGD([*model.parameters(), temperature], lr=optim.peak_lr)

    with pytest.raises(UsageError, match=r"a parameter of shape \(1,\) that is not one of the model's"):
        train(task(build_optimizer=build), tmp_path)


def test_what_the_optimizer_leaves_alone_does_not_clip(tmp_path):
    """Its gradient is never cleared, and on several ranks each one's own: the norm is of what moves."""

    def last_layer(optim, model):
        return torch.optim.SGD(model[-1].parameters(), lr=optim.peak_lr)

    begun = network().double()  # once: thread ranks share one generator

    def work(world):
        made = task(build_optimizer=last_layer, model=copy.deepcopy(begun))
        config = Config(train=TrainConfig(steps=6, global_batch_size=8, max_grad_norm=0.05, precision="fp64"))
        job = settle(made, config, world, RunDirectory(tmp_path), MetricLog(None, []))
        job = dataclasses.replace(job, directory=None)
        training = start_training(job)
        for _ in range(6):
            train_step(job, training)
        return torch.cat([parameter.detach().flatten() for parameter in training.model.parameters()])

    alone = work(SOLO)
    for ours in run_ranks(2, work):
        assert (ours - alone).abs().max() < 1e-12
