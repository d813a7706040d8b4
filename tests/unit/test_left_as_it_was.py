"""A pass that is tried, or computed once more, leaves no trace; what users' code changes is there after a resume."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_components import Lines, StoppedError, job_of
from torch import nn

from hvdtrain.data.own_generators import generators_in
from hvdtrain.models.kept import KeptState
from hvdtrain.settings import OptimConfig
from hvdtrain.trainer import fit
from hvdtrain.trainer.randomness import MicroBatchRandomness
from hvdtrain.trainer.state import start_training


class Late(nn.Module):
    """Begins to drop, and to count, while it is trained."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm, self.p, self.calls = nn.Linear(5, 1), nn.BatchNorm1d(1), 0.0, 0
        self.register_buffer("scale", torch.ones(()), persistent=False)

    def forward(self, x):
        if self.training:
            self.scale = self.scale * 0.9  # another tensor each time
            self.calls += 1
        return F.dropout(self.norm(self.linear(x)), self.p, self.training) * self.scale


class Teacher(nn.Module):
    """A slow copy that each pass moves, in evaluation too, and a count that is its extra state."""

    def __init__(self):
        super().__init__()
        self.learner, self.slow, self.calls = nn.Linear(5, 1), nn.Linear(5, 1), 0
        self.slow.requires_grad_(False)

    def forward(self, x):
        self.calls += 1
        with torch.no_grad():
            for slow, own in zip(self.slow.parameters(), self.learner.parameters(), strict=True):
                slow.lerp_(own, 0.1)
        return self.learner(x) + self.slow(x) / self.calls

    def get_extra_state(self):
        return {"calls": self.calls}

    def set_extra_state(self, state):
        self.calls = state["calls"]


class FrozenNorm(nn.Sequential):
    """Keeps its normalisation in eval mode, as many backbones do."""

    def train(self, mode=True):
        super().train(mode)
        self[1].eval()
        return self


class DropsFrom:
    """A callback."""

    def __init__(self, step):
        self.step = step

    def begin(self, run):
        run.model.p = 0.5 if run.step >= self.step else 0.0

    after_step = begin


class UnfreezesAfter:
    """A callback that knows of one step only, as users write them."""

    def __init__(self, step):
        self.step = step

    def after_step(self, run):
        if run.step == self.step:
            run.model[0].weight.requires_grad_(True)


def of(folder, model, log=None, loss=None, **task):
    job = job_of(folder, log)
    job = dataclasses.replace(job, config=dataclasses.replace(job.config, optim=OptimConfig(peak_lr=0.05, name="sgd")))
    task = {"model": model, **({"loss_sums": loss} if loss else {}), **task}
    return dataclasses.replace(job, task=dataclasses.replace(job.task, **task))


def state_of(model):
    buffers = {name: buffer for name, buffer in model.named_buffers()}
    return [tensor.clone() for tensor in (*model.parameters(), *buffers.values())]


def assert_goes_on(tmp_path, make):
    """A run that is stopped after 9 of 12 steps, with a checkpoint of step 8, ends bit by bit as one that is not."""
    whole = make(tmp_path / "whole", None)
    fit(whole)
    with pytest.raises(StoppedError):
        fit(make(tmp_path / "halves", Lines(stop_at=9)))
    second = make(tmp_path / "halves", None)
    fit(second)
    assert all(map(torch.equal, state_of(whole.task.model), state_of(second.task.model)))
    return whole.task.model, second.task.model


def built(kind, *arguments):
    torch.manual_seed(0)
    return kind(*arguments)


def test_a_pass_that_is_computed_again_counts_once(tmp_path):
    job = of(tmp_path, built(Late), callbacks=[DropsFrom(5)])
    fit(job)
    model = job.task.model
    assert model.norm.num_batches_tracked == 22  # 12 steps of two micro-batches, the last of an epoch of one
    assert model.calls == 23  # one was computed again
    assert model.scale.item() == pytest.approx(0.9**22)


def test_what_begins_to_draw_goes_on_from_a_checkpoint(tmp_path):
    assert_goes_on(tmp_path, lambda folder, log: of(folder, built(Late), log, callbacks=[DropsFrom(5)]))


def test_buffers_that_no_state_dict_holds_go_on(tmp_path):
    whole, _ = assert_goes_on(tmp_path, lambda folder, log: of(folder, built(Late), log))
    assert whole.scale < 0.2


def test_the_check_of_the_first_batch_moves_no_teacher(tmp_path):
    whole, second = assert_goes_on(tmp_path, lambda folder, log: of(folder, built(Teacher), log))
    assert whole.calls == second.calls


def test_what_is_kept_is_put_back_and_what_is_too_large_is_not():
    model = built(Teacher)
    model.register_buffer("mean", torch.zeros(2))
    kept, mean = KeptState(model), model.mean
    before = state_of(model)
    model(torch.ones(3, 5))
    model.slow.weight.data = model.slow.weight + 1
    model.mean = model.mean + 1
    mean += 1
    kept.put_back()
    assert all(map(torch.equal, before, state_of(model)))
    assert model.mean is mean
    assert model.calls == 0
    base = nn.Linear(100, 100).requires_grad_(False)
    with_base = nn.Sequential(base, nn.Linear(100, 1))
    kept = KeptState(with_base)
    with torch.no_grad():
        base.weight += 1
    after = base.weight.clone()
    kept.put_back()
    assert base.weight.equal(after)


def test_a_class_that_freezes_its_norm_in_train_is_heard(tmp_path):
    model = built(lambda: FrozenNorm(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)))
    fit(of(tmp_path, model))
    assert model[1].num_batches_tracked == 0
    assert [module.training for module in model] == [True, False, True]


def frozen_at_first():
    model = built(lambda: nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 1)))
    model[0].weight.requires_grad_(False)
    return model


def all_of_it(optim, model):
    return torch.optim.SGD(model.parameters(), lr=optim.peak_lr)


def test_what_was_unfrozen_by_hand_learns_on_after_a_resume(tmp_path):
    def make(folder, log):
        parts = {"callbacks": [UnfreezesAfter(5)], "build_optimizer": all_of_it}
        return of(folder, frozen_at_first(), log, **parts)

    whole, second = assert_goes_on(tmp_path, make)
    assert second[0].weight.requires_grad
    assert not whole[0].weight.equal(frozen_at_first()[0].weight)


def test_a_program_that_freezes_otherwise_is_right_and_says_so(tmp_path):
    fit(of(tmp_path, frozen_at_first(), callbacks=[UnfreezesAfter(5)], build_optimizer=all_of_it))
    other = frozen_at_first()
    other[1].bias.requires_grad_(False)
    job = of(tmp_path, other, Lines(), build_optimizer=all_of_it)
    start_training(job)
    assert not other[0].weight.requires_grad
    assert any(line.startswith("frozen:") for line in job.log.said)


def test_a_loss_that_writes_into_its_batch_trains_as_one_that_does_not(tmp_path):
    def writing(model, batch):
        x, y = batch
        x.sub_(1).div_(3)
        y.mul_(2)
        return {"loss": (model(x) - y).square().sum()}

    def plain(model, batch):
        x, y = batch
        return {"loss": (model((x - 1) / 3) - y * 2).square().sum()}

    models = []
    for name, loss in (("writing", writing), ("plain", plain)):
        model = built(lambda: nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1)))
        models.append(model)
        fit(of(tmp_path / name, model, loss=loss))
    assert all(map(torch.equal, state_of(models[0]), state_of(models[1])))


class Noisy(nn.Module):
    """Draws from generators of its own."""

    def __init__(self):
        super().__init__()
        self.linear, self.torch, self.numpy = nn.Linear(5, 1), torch.Generator().manual_seed(1), np.random.default_rng(2)
        self.drawn = []

    def forward(self, x):
        noise = torch.randn(x.shape, generator=self.torch) + self.numpy.normal(size=x.shape).astype("float32")
        if self.training:
            self.drawn.append(noise.sum().item())
        return self.linear(x + noise)


def test_generators_that_a_model_keeps_go_on_and_never_repeat_themselves(tmp_path):
    whole, _ = assert_goes_on(tmp_path, lambda folder, log: of(folder, built(Noisy), log))
    assert len(set(whole.drawn)) == len(whole.drawn) == 22


def test_a_generator_of_the_models_own_is_found_out():
    model = built(Noisy)
    own = generators_in(model)
    assert len(own) == 2
    randomness = MicroBatchRandomness(torch.device("cpu"), is_observed=True, own=(*own, torch.default_generator))
    for positions in torch.arange(8).split(4):
        randomness.run(positions, (0, 1), lambda: model(torch.ones(4, 5)), lambda _: None)
    assert randomness.by_micro_batch == {"a generator of your own"}
    assert len(set(model.drawn)) == 2
