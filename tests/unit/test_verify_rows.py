"""verify's rows on random numbers, modes and state, on one rank: each fails where the bug is planted."""

import contextlib
import dataclasses

import pytest
import torch
from test_components import SOLO, job_of
from test_users_code import Counting, Renaming, network
from torch import nn

from hvdtrain.settings import plan_batch
from hvdtrain.trainer import Recipe
from hvdtrain.trainer.component import Component
from hvdtrain.trainer.modes import Modes
from hvdtrain.trainer.randomness import SampleRandomness
from hvdtrain.trainer.seeding import Generators
from hvdtrain.verbs.verify.kept import check_kept
from hvdtrain.verbs.verify.nature import find_nature
from hvdtrain.verbs.verify.random_numbers import check_random
from hvdtrain.verbs.verify.trial import Trial


def nature_of(tmp_path, model=None, noise=None, components=()):
    """Return the nature of a task whose loss adds `noise(inputs)` to its inputs."""
    job = job_of(tmp_path)

    def loss(model, batch):
        x = batch[0] if noise is None else batch[0] + noise(batch[0])
        return {"loss": (model(x) - batch[1]).square().sum()}

    task = dataclasses.replace(job.task, model=model or network(), loss_sums=loss, components=components)
    recipe = Recipe(train=job.config.train, optim=job.config.optim)
    return find_nature(Trial(recipe, task, SOLO, plan_batch(recipe.train, 1), tmp_path, 3))


def lstm(x):
    return nn.LSTM(5, 5, 2, dropout=0.5, batch_first=True).to(x.dtype)(x[:, None])[0][:, 0].detach()


CASES = {
    "none": (None, "pass", "none are drawn"),
    "of samples": (torch.randn_like, "pass", "belong to samples"),
    "of steps": (lambda x: torch.rand(()), "pass", "belong to samples"),
    "of micro-batches": (lambda x: torch.randperm(2)[0], "warning", "belong to micro-batches"),
    "lstm": (lstm, "warning", "belong to micro-batches"),
    "own": (
        lambda x: torch.randn(x.shape, generator=torch.Generator().manual_seed(3)),
        "warning",
        "repeated by a generator of its own",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_which_case_it_is(tmp_path, case):
    noise, status, figure = CASES[case]
    model = nn.Sequential(nn.Linear(5, 1))
    (row,) = check_random(nature_of(tmp_path, model, noise))
    assert (row.status, row.figure) == (status, figure)


def test_seeds_that_are_all_the_same(tmp_path, monkeypatch):
    nature, right = nature_of(tmp_path), Generators.seed
    monkeypatch.setattr(Generators, "seed", lambda self, seed: right(self, 7))
    (row,) = check_random(nature)
    assert row.status == "FAIL"


def test_samples_that_draw_alike(tmp_path, monkeypatch):
    nature, right = nature_of(tmp_path), SampleRandomness._keys

    def bug(self, device):
        return right(self, device)[:1].expand(len(self._positions))

    monkeypatch.setattr(SampleRandomness, "_keys", bug)
    (row,) = check_random(nature)
    assert (row.status, row.figure) == ("FAIL", "not those of samples")


def frozen():
    model = network()
    model[1].eval()
    return model


def around(*layers):
    """Return a builder of a network that has these layers between its own."""
    return lambda: nn.Sequential(nn.Linear(5, 8), *(layer() for layer in layers), nn.Linear(8, 1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.last = nn.GRU(5, 4, batch_first=True), nn.Linear(4, 1)

    def forward(self, x):
        return self.last(self.cell(x[:, None])[0][:, 0])


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.last = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 1)
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.last(self.two(self.one(x)))


def spectral():
    model = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 1))
    nn.utils.parametrizations.spectral_norm(model[0])
    return model


def encoder_in_eval_mode():
    model = nn.Sequential(nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5)).eval().requires_grad_(False), nn.Linear(8, 1))
    model.train()
    model[0].eval()
    return model


HEALTHY = {
    "batch norm and dropout": network,
    "frozen norm": frozen,
    "frozen encoder": encoder_in_eval_mode,
    "eval mode": lambda: network().eval(),
    "extra state": Counting,
    "renamed state": Renaming,
    "layer norm": around(lambda: nn.LayerNorm(8), nn.GELU),
    "batch norm without statistics": around(lambda: nn.BatchNorm1d(8, track_running_stats=False)),
    "batch norm, cumulative": around(lambda: nn.BatchNorm1d(8, momentum=None)),
    "group norm": around(lambda: nn.GroupNorm(2, 8)),
    "alpha dropout": around(nn.SELU, lambda: nn.AlphaDropout(0.2)),
    "feature dropout": around(lambda: nn.Unflatten(1, (4, 2)), lambda: nn.Dropout1d(0.3), nn.Flatten),
    "rrelu": around(nn.RReLU),
    "several dropouts": around(lambda: nn.Dropout(0.1), nn.ReLU, lambda: nn.Dropout(0.3)),
    "convolution": around(lambda: nn.Unflatten(1, (2, 4)), lambda: nn.Conv1d(2, 2, 3, padding=1), nn.Flatten),
    "attention": around(
        lambda: nn.Unflatten(1, (2, 4)),
        lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True),
        nn.Flatten,
    ),
    "recurrent": Recurrent,
    "tied": Tied,
    "spectral norm": spectral,
    "frozen weights": lambda: nn.Sequential(nn.Linear(5, 8).requires_grad_(False), nn.Linear(8, 1)),
}


@pytest.mark.parametrize("kind", HEALTHY)
def test_what_is_healthy_raises_no_alarm(tmp_path, kind):
    nature = nature_of(tmp_path, HEALTHY[kind]())
    rows = [*check_random(nature), *check_kept(nature)]
    assert [(row.number, row.status) for row in rows] == [(9, "pass"), (10, "pass"), (11, "pass")]


def test_an_evaluation_that_puts_all_into_training_mode(tmp_path, monkeypatch):
    @contextlib.contextmanager
    def bug(model):
        model.eval()
        yield
        model.train()

    monkeypatch.setattr("hvdtrain.trainer.evaluation.in_eval_mode", bug)
    modes, _ = check_kept(nature_of(tmp_path, frozen()))
    assert (modes.status, modes.figure) == ("FAIL", "1 not, after an evaluation")


class Freeze(Component):
    name = "freeze"

    def __init__(self, job):
        pass

    def after_update(self, training, step):
        training.model[1].eval()


def test_modes_that_are_not_in_the_checkpoint(tmp_path, monkeypatch):
    nature = nature_of(tmp_path, network(), components=(Freeze,))
    monkeypatch.setattr(Modes, "load_state_dict", lambda self, state: None)
    modes, _ = check_kept(nature)
    assert (modes.status, modes.figure) == ("FAIL", "1 not, after a restart")


@pytest.mark.parametrize("build", [Counting, Renaming])
def test_a_checkpoint_that_does_not_hold_all_of_state_dict(tmp_path, monkeypatch, build):
    """As it was: parameters by their own names, and nothing else."""
    nature = nature_of(tmp_path, build())

    def bug(model, weights, extra):
        own = dict(model.named_parameters())
        with torch.no_grad():
            for name, tensor in weights.items():
                if name in own:
                    own[name].copy_(tensor)

    monkeypatch.setattr("hvdtrain.trainer.saved_state.load_model_weights", bug)
    _, state = check_kept(nature)
    assert state.status == "FAIL"
