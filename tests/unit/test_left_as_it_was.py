"""A pass that is tried, or computed once more, leaves no trace; what users' code changes is there after a resume."""

import dataclasses
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_components import Lines, StoppedError, job_of
from torch import nn

from hvdtrain.data.dataset import TensorSamples
from hvdtrain.data.own_generators import generators_in, states_of
from hvdtrain.errors import ConfigError
from hvdtrain.models.kept import KeptState
from hvdtrain.optim.adamw import AdamWConfig
from hvdtrain.settings import OptimConfig, TrainConfig
from hvdtrain.trainer import Recipe, Task, fit, settle
from hvdtrain.trainer.job import check_names
from hvdtrain.trainer.randomness import MicroBatchRandomness
from hvdtrain.trainer.state import start_training
from hvdtrain.trainer.task import build_task


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
    return [tensor.clone() for tensor in (*model.parameters(), *model.buffers())]


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
        self.linear, self.torch, self.numpy = (
            nn.Linear(5, 1),
            torch.Generator().manual_seed(1),
            np.random.default_rng(2),
        )
        self.drawn = []

    def forward(self, x):
        noise = torch.randn(x.shape, generator=self.torch) + torch.tensor(self.numpy.normal(size=x.shape)).float()
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
    assert states_of([random.SystemRandom()]) == [""]  # nobody can tell
    assert randomness.by_micro_batch == {"a generator of your own"}
    assert len(set(model.drawn)) == 2


class Remembers(nn.Module):
    """Has a buffer of another shape, or one more, after its first pass."""

    def __init__(self, is_there, persistent=True):
        super().__init__()
        self.linear = nn.Linear(5, 1)
        self.register_buffer("seen", torch.zeros(0, 5) if is_there else None, persistent=persistent)

    def forward(self, x):
        if self.training:
            self.seen = x.detach() if self.seen is None else torch.cat((self.seen, x.detach()))
        return self.linear(x)


@pytest.mark.parametrize(("is_there", "says"), [(True, r"was \(0, 5\) before"), (False, "was not there before")])
def test_a_state_that_could_not_be_loaded_again_is_told_in_the_first_step(tmp_path, is_there, says):
    with pytest.raises(ConfigError, match=rf"seen of the model is \(4, 5\) after the first step, and {says}"):
        fit(of(tmp_path, built(Remembers, is_there)))


@pytest.mark.parametrize("is_there", [True, False])
def test_what_grows_outside_of_the_state_goes_on(tmp_path, is_there):
    whole, _ = assert_goes_on(tmp_path, lambda folder, log: of(folder, built(Remembers, is_there, False), log))
    assert len(whole.seen) == 44  # the samples of 12 steps


def test_what_an_optimizer_leaves_in_its_first_step_is_looked_at(tmp_path):
    class Odd(torch.optim.SGD):
        def step(self, closure=None):
            self.state[self.param_groups[0]["params"][0]]["history"] = {1, 2}
            return super().step(closure)

    def build(optim, model):
        return Odd(model.parameters(), lr=optim.peak_lr)

    job = of(tmp_path, frozen_at_first(), Lines(), build_optimizer=build)
    with pytest.raises(ConfigError, match=r"the optimizer's state.*of type set"):
        fit(job)
    assert job.log.lines == []


def test_a_loss_of_nothing_later_on_says_what_to_return(tmp_path):
    calls = []

    def loss(model, batch):
        calls.append(1)
        return {"loss": model(batch[0]).square().sum() if len(calls) < 20 else torch.zeros(())}

    with pytest.raises(ConfigError, match="return 0 times what the model has computed"):
        fit(of(tmp_path, frozen_at_first(), loss=loss))


def test_models_that_are_not_ready_are_told(tmp_path):
    with pytest.raises(ConfigError, match="weight has no shape yet"):
        of(tmp_path, nn.LazyLinear(1))
    with pytest.raises(ConfigError, match="weight is on torch's device meta"):
        start_training(of(tmp_path, nn.Linear(5, 1, device="meta")))


def test_complex_weights_take_the_default_optimizer(tmp_path):
    model = built(nn.Linear, 5, 1)
    model.register_parameter("phase", nn.Parameter(torch.ones(1, dtype=torch.complex64)))

    def loss(model, batch):
        return {"loss": ((model(batch[0]) * model.phase).abs() - batch[1]).square().sum()}

    job = of(tmp_path, model, loss=loss)
    fit(dataclasses.replace(job, config=dataclasses.replace(job.config, optim=AdamWConfig(peak_lr=0.01))))
    assert model.phase.item() != 1


def test_a_mean_over_no_targets_is_a_sum_of_nothing(tmp_path):
    """In micro-batches of one sample, half of them without a label, as in a whole batch."""

    class Labelled(TensorSamples):
        def num_targets(self, indices):
            return int((self.tensors[1][indices] >= 0).sum())

    def loss(model, batch):
        return {"loss": F.cross_entropy(model(batch[0]), batch[1])}

    x, y = torch.linspace(-1, 1, 110).view(22, 5), torch.arange(22).remainder(4) - 1
    data, models = Labelled(x, y.where(y >= 0, -100)), []
    for size in (4, 1):
        model = built(nn.Linear, 5, 3)
        models.append(model)
        job = of(tmp_path / str(size), model, loss=loss, train_data=data, val_data=data, reduction="mean")
        train = dataclasses.replace(job.config.train, micro_batch_size=size, precision="fp64", accum_steps=4 // size)
        fit(settle(job.task, dataclasses.replace(job.config, train=train), job.world, job.directory, job.log))
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(*map(state_of, models), strict=True))


def test_sparse_buffers_are_left_alone(tmp_path):
    model = built(nn.Linear, 5, 1)
    model.register_buffer("edges", torch.eye(3).to_sparse(), persistent=False)
    fit(of(tmp_path, model))
    assert model.edges.to_dense().equal(torch.eye(3))


def test_what_a_build_draws_without_a_seed_is_alike_and_the_callers_numbers_go_on():
    class Unseeded(Recipe):
        def build(self, say):
            model = nn.Linear(5, 1)
            numbers = torch.tensor([np.random.rand(), random.random()])
            data = TensorSamples(torch.rand(4, 5), torch.rand(4, 1))
            return Task(
                model=model, train_data=data, val_data=data, loss_sums=lambda m, b: {"loss": m(b[0]).sum()}
            ), numbers

    def built_with(seed):
        task, numbers = build_task(Unseeded(train=TrainConfig(steps=1, global_batch_size=2, seed=seed)), print)
        return [*task.model.parameters(), *task.train_data.tensors, numbers]

    torch.manual_seed(7)
    expected = torch.rand(2)
    torch.manual_seed(7)
    first = built_with(3)
    assert torch.rand(2).equal(expected)
    assert all(map(torch.equal, first, built_with(3)))
    assert not any(map(torch.equal, first, built_with(4)))


def test_a_metric_by_the_name_of_a_figure_that_lines_have_anyway_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"names 'lr', and train/lr is a figure"):
        check_names(of(tmp_path, frozen_at_first(), metrics=("loss", "lr")).task)
