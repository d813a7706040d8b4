"""What a person should know of a loss at the first batch: said once, in a line, and never of a healthy one."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from test_components import SOLO, Lines
from test_contract import HEALTHY, Padded, language, network, padded_mean, padded_sum, samples, task
from thread_world import run_ranks
from torch import nn

from hvdtrain.rundir.directory import RunDirectory
from hvdtrain.settings import Config, LogConfig, TrainConfig
from hvdtrain.trainer import fit, settle
from hvdtrain.trainer.contract import first_batch


def said(made, tmp_path):
    log = Lines()
    config = Config(train=TrainConfig(steps=1, global_batch_size=8), log=LogConfig(every=1))
    fit(settle(made, config, SOLO, RunDirectory(tmp_path), log))
    return [line for line in log.said if line.startswith(("WARNING", "metrics:"))]


def passing_over(model, batch):
    x, y = batch
    return {"loss": F.cross_entropy(model(x), y.where(torch.arange(len(y)) % 3 > 0, -100))}


def weighted(model, batch):
    return {"loss": F.cross_entropy(model(batch[0]), batch[1], weight=torch.tensor([1.0, 9.0]))}


def contrastive_mean(model, batch):
    z = F.normalize(model(batch[0]), dim=1)
    return {"loss": F.cross_entropy(z @ z.T, torch.arange(len(z)))}


def of_the_longest(model, batch):
    x, y = batch
    return {"loss": F.cross_entropy(model(x), y, reduction="sum") * x.abs().max()}


DEPENDS = {
    "labels passed over": lambda: task(passing_over, reduction="mean"),
    "classes weighted": lambda: task(weighted, reduction="mean"),
    "contrastive": lambda: task(contrastive_mean, reduction="mean"),
    "scaled by the batch": lambda: task(of_the_longest),
    "contrastive sum": HEALTHY["contrastive"],
    "normalised over the batch": HEALTHY["batch norm without statistics"],
}


@pytest.mark.parametrize("name", DEPENDS)
def test_a_loss_that_depends_on_who_is_together_is_told(tmp_path, name):
    (line,) = said(DEPENDS[name](), tmp_path)
    assert "is not the" in line
    assert "on another number of ranks" in line


def noisy(model, batch):
    return {"loss": (model(batch[0]) * torch.randn(())).square().mean()}


FINE = {
    **{name: make for name, make in HEALTHY.items() if name not in ("contrastive", "batch norm without statistics")},
    "mean": lambda: task(lambda m, b: {"loss": F.cross_entropy(m(b[0]), b[1])}, reduction="mean"),
    "mean over padding": lambda: task(padded_mean, language(), Padded(), reduction="mean"),
    "drawn": lambda: task(noisy, reduction="mean"),
    "nan": lambda: task(lambda m, b: {"loss": padded_sum(m, b)["loss"] * torch.nan}, language(), Padded()),
}


@pytest.mark.parametrize("name", FINE)
def test_a_healthy_loss_is_not(tmp_path, name):
    assert not [line for line in said(FINE[name](), tmp_path) if "is not the" in line]


def with_figure(figure):
    def loss_sums(model, batch):
        scores = model(batch[0])
        return {"loss": F.cross_entropy(scores, batch[1], reduction="sum"), "figure": figure(scores.detach())}

    return dataclasses.replace(task(loss_sums), metrics=("loss", "figure"))


ROUNDING = {
    "differences of what is equal": lambda scores: 1e-7 * len(scores) ** 2 * scores.sum(),
    "counts of scores that tie": lambda scores: (scores[:, 0] >= scores[:, 0].mean()).sum(),
}


@pytest.mark.parametrize("name", ROUNDING)
def test_rounding_of_a_figure_is_no_other_loss(tmp_path, name):
    """As a dpo's rewards before its first step: all of them are 0, and rounding says which answer has the larger."""
    assert said(with_figure(ROUNDING[name]), tmp_path) == []


def test_a_figure_that_depends_on_who_is_together_is_not_called_the_loss(tmp_path):
    (line,) = said(with_figure(lambda scores: scores.exp().sum() * len(scores)), tmp_path)
    assert "'figure' of some samples" in line
    assert "it is another figure (the loss is not concerned)" in line
    assert "trained" not in line


def test_a_figure_that_no_metric_names_is_told(tmp_path):
    def more(model, batch):
        scores = model(batch[0])
        return {"loss": F.cross_entropy(scores, batch[1], reduction="sum"), "hits": scores.argmax(1).sum()}

    assert said(task(more), tmp_path) == [
        "metrics:    loss_sums returns 'hits', too, which Task(metrics=...) does not name: not logged"
    ]


def test_a_collate_that_draws_is_told(tmp_path):
    x, y = samples().tensors

    def masked(items):
        x, y = map(torch.stack, zip(*items, strict=True))
        return x * torch.bernoulli(torch.full_like(x, 0.9)), y

    pairs = list(zip(x, y, strict=True))
    (line,) = said(task(data=pairs, collate=masked), tmp_path / "drawing")
    assert line.startswith("WARNING: Task(collate=...) draws")
    generator = torch.Generator()

    def own(items):
        x, y = map(torch.stack, zip(*items, strict=True))
        return x + torch.rand(x.shape, generator=generator), y

    assert len(said(task(data=pairs, collate=own), tmp_path / "own")) == 1
    plain = lambda items: tuple(map(torch.stack, zip(*items, strict=True)))  # noqa: E731
    assert said(task(data=pairs, collate=plain), tmp_path / "plain") == []


def test_what_one_rank_finds_is_said_by_rank_0(tmp_path):
    """One that has no label to pass over knows nothing of it."""

    def work(world):
        made = task(lambda m, b: {"loss": F.cross_entropy(m(b[0]), b[1])}, reduction="mean", model=nn.Linear(6, 2))
        config = Config(train=TrainConfig(steps=2, global_batch_size=8), log=LogConfig(every=1))
        job = settle(made, config, world, RunDirectory(tmp_path), log := Lines())
        x, y = made.train_data.batch(torch.arange(4))
        y = y.clone()
        if world.rank == 1:
            y[0] = -100
        first_batch(job, made.model, torch.arange(4), lambda: (x, y), lambda batch: made.loss_sums(made.model, batch))
        return log.said

    for lines in run_ranks(2, work):
        assert len(lines) == 1
        assert "ignore_index" in lines[0]


def test_data_that_makes_its_own_batches_takes_no_collate():
    with pytest.raises(Exception, match=r"Task\(collate=...\) would never be called: TensorSamples"):
        task(collate=lambda items: items)
    mixed = task(collate=torch.utils.data.default_collate, data=[*zip(*samples().tensors, strict=True)])
    dataclasses.replace(mixed, model=network())  # a task that is copied has none any more
