"""`verify` catches planted bugs, each in the right row, and passes what is healthy without a false alarm."""

import dataclasses
import random

import horovod.torch as hvd
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hvdtrain import (
    CommConfig,
    ModelConfig,
    OptimConfig,
    Recipe,
    Task,
    TensorSamples,
    TrainConfig,
)
from hvdtrain.data.order import SampleOrder
from hvdtrain.errors import DataError
from hvdtrain.optim.sgd import SgdConfig
from hvdtrain.settings import plan_batch
from hvdtrain.trainer import saved_state
from hvdtrain.trainer.buffers import ChangingBuffers
from hvdtrain.trainer.seeding import Generators
from hvdtrain.verbs.verify.checks import all_checks
from hvdtrain.verbs.verify.exactness import check_average, check_one_rank
from hvdtrain.verbs.verify.nature import find_nature
from hvdtrain.verbs.verify.random_numbers import check_random
from hvdtrain.verbs.verify.samples import check_epoch
from hvdtrain.verbs.verify.trial import Trial
from hvdtrain.world.exchange import GradientExchange
from hvdtrain.world.horovod import HorovodWorld

# Planted bugs and healthy recipes are the same under Gloo; test_verify_verb.py starts it there.
pytestmark = pytest.mark.same_on_gloo

CASES = {
    "dropout": {"dropout": 0.3},
    "batch norm, synchronised": {"norm": True, "model": ModelConfig(sync_batch_norm=True)},
    "batch norm and dropout, synchronised": {"norm": True, "dropout": 0.2, "model": ModelConfig(sync_batch_norm=True)},
    "accumulation": {"accum_steps": 3, "global_batch_size": 24},
    "accumulation and dropout": {"accum_steps": 4, "dropout": 0.5, "global_batch_size": 16},
    "odd batches": {"global_batch_size": 12, "micro_batch_size": 6 // 3},
    "sgd, no clipping, layers of one type": {
        "optim": SgdConfig(peak_lr=0.1, momentum=0.9),
        "max_grad_norm": None,
        "norm": None,
        "width": 33,
        "kind": "foreach",
    },
    "RMSprop, linear rule, warm-up": {
        "optim": OptimConfig(name="RMSprop", peak_lr=0.01, lr_rule="linear", reference_batch=8, warmup_steps=20)
    },
    "checkpointed blocks, tight clipping": {
        "model": ModelConfig(checkpoint_blocks=True),
        "dropout": 0.3,
        "max_grad_norm": 0.01,
    },
    "muon": {"optim": OptimConfig(name="muon", peak_lr=0.01)},
    "NAdam": {"optim": OptimConfig(name="NAdam", peak_lr=0.01)},
    "fp64": {"precision": "fp64"},
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16"},
    "bf16-true": {"precision": "bf16-true"},
    "fp16 on the wire": {"comm": CommConfig(compression="fp16")},
    "sparse embedding": {"kind": "words", "optim": OptimConfig(name="sgd", peak_lr=0.1)},
    "frozen and unused": {"kind": "partial"},
    "fp32 inside": {"kind": "fp32"},
    "diffusion": {"kind": "diffusion", "accum_steps": 2},
}


class Net(torch.nn.Module):
    def __init__(self, recipe):
        super().__init__()
        torch.manual_seed(recipe.train.seed)
        self.kind = recipe.kind
        self.first = torch.nn.Linear(6, recipe.width)
        if self.kind == "words":
            self.embed = torch.nn.Embedding(20, recipe.width, sparse=True)
        self.blocks = torch.nn.ModuleList(self.block(recipe) for _ in range(2))
        self.last = torch.nn.Linear(recipe.width, 3)
        if self.kind == "partial":
            self.first.requires_grad_(False)
            self.unused = torch.nn.Linear(3, 3)

    def block(self, recipe):
        layers = [torch.nn.Linear(recipe.width, recipe.width)]
        if recipe.norm:
            layers.append(torch.nn.BatchNorm1d(recipe.width))
        return torch.nn.Sequential(*layers, torch.nn.Tanh(), torch.nn.Dropout(recipe.dropout))

    def forward(self, x):
        if self.kind == "fp32":
            x = x.float()
        if self.kind == "words":
            x = self.embed((x[:, :2].abs() * 5).long() % 20).mean(1) + self.first(x)
        else:
            x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.last(x)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Small(Recipe):
    norm: bool | None = False
    dropout: float = 0.0
    width: int = 16
    kind: str = "plain"

    def build(self, say):
        generator = torch.Generator().manual_seed(5)
        x, y = torch.randn(200, 6, generator=generator), torch.randint(0, 3, (200,), generator=generator)

        def loss(model, batch):
            if self.kind == "diffusion":  # a time and noise for each sample
                times = torch.randint(0, 10, (len(batch[0]),))
                batch = (batch[0] + 0.1 * times[:, None] * torch.randn_like(batch[0]), batch[1])
            if self.kind == "mixed":  # one number for a whole micro-batch
                batch = (batch[0] * (1 + torch.randperm(2)[0] + random.random() + np.random.rand()), batch[1])
            return {
                "loss": F.cross_entropy(
                    model(batch[0]).float() if self.kind == "fp32" else model(batch[0]), batch[1], reduction="sum"
                )
            }

        data = TensorSamples(x, y)
        own = {"build_optimizer": that_writes_into_gradients} if self.kind == "foreach" else {}
        return Task(model=Net(self), train_data=data, val_data=data, loss_sums=loss, **own)


def that_writes_into_gradients(optim, model):
    """As on GPUs: torch's way with few kernels adds the momentum to the gradients in place."""
    return torch.optim.SGD(model.parameters(), lr=optim.peak_lr, momentum=0.9, nesterov=True, foreach=True)


def small(optim=None, comm=None, model=None, norm=False, dropout=0.0, width=16, kind="plain", **train):
    return Small(
        train=TrainConfig(**{"steps": 100, "global_batch_size": 16, **train}),
        optim=optim or OptimConfig(peak_lr=0.01),
        comm=comm or CommConfig(),
        model=model or ModelConfig(),
        norm=norm,
        dropout=dropout,
        width=width,
        kind=kind,
    )


def verified(world, folder, recipe, task=None):
    task = task or recipe.build(print)
    plan = plan_batch(recipe.train, world.size)
    return all_checks(Trial(recipe, task, world, plan, folder, 3), lambda row: None)


CHECKS = {2: check_one_rank, 3: check_epoch, 4: check_average, 9: check_random}


def rows_of(numbers, world, folder, recipe, task=None):
    """Run some of the checks, on a task in which a bug is planted; those before them find their own."""
    task = task or recipe.build(print)
    nature = find_nature(Trial(recipe, task, world, plan_batch(recipe.train, world.size), folder, 3))
    return [row for number in numbers for row in CHECKS[number](nature)]


def failures(rows):
    return [row.number for row in rows if row.status == "FAIL"]


@pytest.mark.ranks(2)
@pytest.mark.parametrize("case", CASES)
def test_healthy(world, shared_dir, case):
    rows = verified(world, shared_dir, small(**CASES[case]))
    assert [row for row in rows if row.status in ("FAIL", "warning")] == []
    assert {row.number for row in rows if row.status == "pass"} >= {1, 2, 3, 4, 6, 7, 8, 9, 10, 11}


@pytest.mark.ranks(1, 4)
def test_healthy_on_other_numbers_of_ranks(world, shared_dir):
    for name in ("accumulation and dropout", "batch norm, synchronised"):
        rows = verified(world, shared_dir / name, small(**CASES[name]))
        assert [row for row in rows if row.status in ("FAIL", "warning")] == []


@pytest.mark.ranks(2, 4)
def test_batch_norm_alone_is_a_warning_with_its_size(world, shared_dir):
    rows = verified(world, shared_dir, small(norm=True))
    assert failures(rows) == []
    (row,) = [row for row in rows if row.status == "warning"]
    assert row.number == 8
    assert row.value > 1e-3
    assert "sync-batch-norm" in row.advice


@pytest.mark.ranks(2)
def test_adasum_is_not_compared(world, shared_dir):
    if world.launch.launcher != "mpirun":
        pytest.skip("Adasum needs MPI")
    rows = verified(world, shared_dir, small(comm=CommConfig(op="adasum")))
    assert failures(rows) == []
    assert [row.number for row in rows if row.status == "not run"] == [2, 4]


@pytest.mark.ranks(1, 2, 4)
def test_numbers_of_micro_batches_are_a_warning_and_no_failure(world, shared_dir):
    rows = verified(world, shared_dir, small(kind="mixed", accum_steps=2))
    assert failures(rows) == []
    (row,) = [row for row in rows if row.status == "warning"]
    assert row.number == 9
    assert "drawn from Python, numpy, torch" in row.advice


@pytest.mark.ranks(2, 4)
def test_numbers_that_are_the_same_on_all_ranks_are_found(world, shared_dir, monkeypatch):
    right = Generators.seed
    monkeypatch.setattr(Generators, "seed", lambda self, seed: right(self, 1))
    assert failures(rows_of([9], world, shared_dir, small(kind="mixed"))) == [9]


def replace_on(world, rank, monkeypatch, owner, name, bug):
    if world.rank == rank:
        monkeypatch.setattr(owner, name, bug(getattr(owner, name)))


@pytest.mark.ranks(2)
@pytest.mark.parametrize("case", ["dropout"])
class TestPlanted:
    """One bug each; the row that must show it."""

    @pytest.fixture
    def recipe(self, case):
        return small(**CASES[case] if case else {}, accum_steps=2)

    def test_another_seed_on_a_rank(self, world, shared_dir, recipe):
        other = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, seed=world.rank))
        rows = verified(world, shared_dir, recipe, other.build(print))
        assert failures(rows)[0] == 1
        assert "first.weight on rank 1" in rows[0].advice

    def test_no_broadcast(self, world, shared_dir, recipe, monkeypatch):
        monkeypatch.setattr(HorovodWorld, "broadcast_state", lambda self, model, optimizer=None: None)
        assert failures(verified(world, shared_dir, recipe)) == [6, 10]  # both go on from a checkpoint

    def test_a_mean_of_means(self, world, shared_dir, recipe):
        task = recipe.build(print)
        plain = task.loss_sums
        task = dataclasses.replace(
            task, loss_sums=lambda model, batch: {"loss": plain(model, batch)["loss"] / max(1, len(batch[1])) * 8}
        )
        assert failures(rows_of([2], world, shared_dir, recipe, task)) == [2]

    def test_two_ranks_read_one_part(self, world, shared_dir, recipe, monkeypatch):
        def bug(right):
            return lambda self, step, rank, in_step=False: right(self, step, 0, in_step)

        monkeypatch.setattr(SampleOrder, "micro_batches", only_in_training(bug, world))
        assert failures(rows_of([2, 3], world, shared_dir, recipe)) == [2, 3]

    def test_a_rank_skips_a_batch(self, world, shared_dir, recipe, monkeypatch):
        def bug(right):
            return lambda self, step, rank, in_step=False: right(self, step, rank, in_step)[: None if rank == 0 else -1]

        monkeypatch.setattr(SampleOrder, "micro_batches", only_in_training(bug, world))
        assert failures(rows_of([2, 3], world, shared_dir, recipe)) == [2, 3]

    def test_unscaled_before_synchronize(self, world, shared_dir, recipe, monkeypatch):
        """The local gradient is unscaled while it is sent, and once more afterwards."""
        right = GradientExchange.finish

        def bug(self):
            for parameter in self._parameters():
                if parameter.grad is not None:
                    parameter.grad = parameter.grad / 65536
            right(self)

        monkeypatch.setattr(GradientExchange, "finish", bug)
        fp16 = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, precision="fp16"))
        assert failures(rows_of([4], world, shared_dir, fp16)) == [4]

    def test_clipped_before_synchronize(self, world, shared_dir, recipe, monkeypatch):
        right = GradientExchange.finish

        def bug(self):
            torch.nn.utils.clip_grad_norm_(list(self._parameters()), 0.1)
            right(self)

        monkeypatch.setattr(GradientExchange, "finish", bug)
        assert failures(rows_of([2, 4], world, shared_dir, recipe)) == [2, 4]

    def test_batch_norm_drifts(self, world, shared_dir, recipe, monkeypatch):
        monkeypatch.setattr(ChangingBuffers, "average", lambda self, world: None)
        rows = verified(world, shared_dir, dataclasses.replace(recipe, norm=True))
        assert 7 in failures(rows)
        assert "running_mean" in next(row for row in rows if row.number == 7).advice

    def test_a_hidden_step(self, world, shared_dir, recipe, monkeypatch):
        """Horovod's own broadcast of a fresh optimizer's state."""

        def bug(self, model, optimizer=None):
            hvd.broadcast_parameters(model.state_dict(), root_rank=0)
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = torch.zeros_like(parameter)
            optimizer.step()

        monkeypatch.setattr(HorovodWorld, "broadcast_state", bug)
        assert failures(rows_of([2], world, shared_dir, recipe)) == [2]

    def test_a_gradient_that_stays_at_home(self, world, shared_dir, recipe, monkeypatch):
        right = GradientExchange._trainable
        monkeypatch.setattr(GradientExchange, "_trainable", lambda self: right(self)[1:])
        assert {2, 4, 7} <= set(failures(verified(world, shared_dir, recipe)))

    def test_moments_missing_from_the_checkpoint(self, world, shared_dir, recipe, monkeypatch):
        right = saved_state.training_state

        def bug(job, training):
            state = right(job, training)
            return {**state, "optimizer": {**state["optimizer"], "state": {}}}

        monkeypatch.setattr("hvdtrain.trainer.saver.training_state", bug)
        assert failures(verified(world, shared_dir, recipe)) == [6]

    def test_other_data_on_a_rank(self, world, shared_dir, recipe):
        task = recipe.build(print)
        if world.rank == 1:
            task.train_data.tensors[0][100:] += 1
        with pytest.raises(DataError, match="rank 1 has other samples"):  # no training begins on such data
            verified(world, shared_dir, recipe, task)

    def test_random_numbers_of_its_own(self, world, shared_dir, recipe):
        task = recipe.build(print)
        chance, plain = random.SystemRandom(), task.loss_sums  # one that nobody can seed
        task = dataclasses.replace(
            task, loss_sums=lambda model, batch: plain(model, (batch[0] + 1e-3 * chance.random(), batch[1]))
        )
        rows = verified(world, shared_dir, recipe, task)
        assert 2 in failures(rows)
        assert any(row.number == 8 and row.status == "warning" for row in rows)

    def test_a_generator_that_the_loss_keeps(self, world, shared_dir, recipe):
        task = recipe.build(print)
        chance, plain = random.Random(world.rank), task.loss_sums
        task = dataclasses.replace(
            task, loss_sums=lambda model, batch: plain(model, (batch[0] + 1e-3 * chance.random(), batch[1]))
        )
        rows = verified(world, shared_dir, recipe, task)
        assert failures(rows) == []
        (row,) = [row for row in rows if row.status == "warning"]
        assert row.number == 9
        assert "drawn from a generator of your own" in row.advice


def only_in_training(bug, world):
    """Apply a bug where a rank takes its part, not where one rank stands for many or all are counted."""
    right = SampleOrder.micro_batches

    def chosen(self, step, rank, in_step=False):
        is_training = type(self) is SampleOrder and self.plan.world_size == world.size and self.num_samples < 200
        is_training = is_training and not in_step
        return (bug(right) if is_training else right)(self, step, rank, in_step)

    return chosen
