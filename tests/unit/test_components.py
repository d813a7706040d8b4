"""Components: their state goes through a checkpoint, on any number of ranks; the average of weights is torch's."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from hvdtrain.data.dataset import TensorSamples
from hvdtrain.errors import ConfigError
from hvdtrain.process.launch import Launch
from hvdtrain.rundir.checkpoint import load_checkpoint
from hvdtrain.rundir.directory import RunDirectory
from hvdtrain.rundir.log import MetricLog
from hvdtrain.rundir.trained import open_trained
from hvdtrain.settings import CheckpointConfig, Config, EvalConfig, LogConfig, OptimConfig, TrainConfig
from hvdtrain.trainer import Task, components, evaluate, fit, settle, train_step
from hvdtrain.trainer.component import Component
from hvdtrain.trainer.ema import WeightAverage
from hvdtrain.trainer.formats import upgraded
from hvdtrain.trainer.memory import estimate
from hvdtrain.trainer.noise import NoiseScale
from hvdtrain.trainer.state import replicated_tensors, start_training
from hvdtrain.trainer.window import MetricWindow
from hvdtrain.world import SoloWorld

SOLO = SoloWorld(torch.device("cpu"), Launch("none"))


def list_checkpoints(run_dir):
    return list(RunDirectory(run_dir).checkpoints.by_step().values())


class AskedLater(SoloWorld):
    """One process on what cannot be looked at without waiting, as a GPU, that counts what it starts."""

    reads_at_once = False

    def __init__(self):
        super().__init__(torch.device("cpu"), Launch("none"))
        self.started = []

    def start_all_reduce(self, tensor, op, name):
        self.started.append(name)
        return super().start_all_reduce(tensor, op, name)


class StoppedError(Exception):
    pass


class Lines(MetricLog):
    """Keeps what is written and said, and may end the run."""

    def __init__(self, stop_at=None):
        super().__init__(None, [])
        self.stop_at, self.lines, self.said = stop_at, [], []

    def say(self, text):
        self.said.append(text)

    def write(self, step, metrics, event=None):
        if self.stop_at is not None and step >= self.stop_at:
            raise StoppedError
        self.lines.append((step, {k: v for k, v in metrics.items() if not k.startswith(("time", "through", "memory"))}))


def job_of(run_dir, log=None, bad=(), **train):
    """Return a job of a small regression with dropout and batch normalisation, in batches of 4 of 22 samples."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(22, 5, generator=generator)
    y = x.sin().sum(1, keepdim=True)
    x[list(bad)] = torch.nan
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 1))

    def loss(model, batch):
        return {"loss": (model(batch[0]) - batch[1]).square().sum()}

    held_out = TensorSamples(x[:6].nan_to_num(), y[:6])
    task = Task(model=model, train_data=TensorSamples(x, y), val_data=held_out, loss_sums=loss)
    config = Config(
        train=TrainConfig(**{"steps": 12, "global_batch_size": 4, "micro_batch_size": 2, **train}),
        optim=OptimConfig(peak_lr=0.05),
        log=LogConfig(every=3),
        eval=EvalConfig(every=4),
        checkpoint=CheckpointConfig(every=4, keep_last=None),
    )
    return settle(task, config, SOLO, RunDirectory(run_dir), log or Lines())


@pytest.mark.parametrize("bad", [(), (2, 11)], ids=["", "skipped steps"])
def test_the_average_of_weights_is_torchs(tmp_path, bad):
    job = job_of(tmp_path, ema=0.9, bad=bad)
    training = start_training(job)
    reference = AveragedModel(training.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for _ in range(12):
        before = training.model[0].weight.clone()
        train_step(job, training)
        if not before.equal(training.model[0].weight):
            reference.update_parameters(training.model)
    average = training.component(WeightAverage).evaluated_weights()
    for name, parameter in reference.module.named_parameters():
        assert (average[name] - parameter).abs().max() < 1e-6
        assert (average[name] - dict(training.model.named_parameters())[name]).abs().max() > 1e-4


def test_the_average_is_evaluated_saved_and_left_in_the_model(tmp_path):
    log = Lines()
    job = job_of(tmp_path, log, ema=0.9)
    metrics = fit(job)
    assert any("--train.ema 0.9" in line for line in log.said)
    saved = load_checkpoint(list_checkpoints(tmp_path)[-1])
    average = saved.state["components"]["ema"]["weights"]
    assert saved.state["exported"]["component"] == "ema"
    own = job.task.model.state_dict()
    assert all(own[name].equal(tensor) for name, tensor in average.items())
    assert not saved.weights["0.weight"].equal(average["0.weight"])
    x, y = job.task.val_data.tensors
    with torch.no_grad():
        loss = (job.task.model.eval()(x) - y).square().mean()
    assert metrics["val/loss"] == pytest.approx(float(loss), rel=1e-5)


def test_the_average_is_what_is_exported(tmp_path):
    """`open_trained` reads it, in the type of the weights, and says what it is."""
    fit(job_of(tmp_path, ema=0.9, precision="bf16-true"))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    saved, trained = load_checkpoint(list_checkpoints(tmp_path)[-1]), open_trained(tmp_path, "latest")
    average = saved.state["components"]["ema"]["weights"]
    assert all(trained.weights[name].equal(tensor.bfloat16()) for name, tensor in average.items())
    assert trained.weights["1.num_batches_tracked"].equal(saved.weights["1.num_batches_tracked"])
    assert "--train.ema 0.9" in trained.about
    fit(job_of(tmp_path / "plain"))
    (tmp_path / "plain" / "model").mkdir()
    (tmp_path / "plain" / "model" / "config.json").write_text("{}")
    assert open_trained(tmp_path / "plain", "latest").about == ""


def test_evaluation_puts_the_weights_back(tmp_path):
    job = job_of(tmp_path, ema=0.9)
    training = start_training(job)
    for _ in range(3):
        train_step(job, training)
    before = {name: tensor.clone() for name, tensor in training.model.state_dict().items()}
    evaluate(job, training)
    assert all(tensor.equal(before[name]) for name, tensor in training.model.state_dict().items())


def test_training_with_an_average_moves_the_same_weights(tmp_path):
    fit(job_of(tmp_path / "with", ema=0.5))
    fit(job_of(tmp_path / "without"))
    with_it, without = (load_checkpoint(list_checkpoints(tmp_path / name)[-1]).weights for name in ("with", "without"))
    assert all(with_it[name].equal(tensor) for name, tensor in without.items())


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16-true"])
def test_a_run_that_goes_on_is_bitwise_the_same(tmp_path, precision):
    whole, halves = Lines(), Lines()
    settings = {"ema": 0.8, "precision": precision}
    fit(job_of(tmp_path / "whole", whole, **settings))
    with pytest.raises(StoppedError):
        fit(job_of(tmp_path / "halves", Lines(stop_at=9), **settings))
    fit(job_of(tmp_path / "halves", halves, **settings))
    assert halves.lines == [line for line in whole.lines if line[0] > 8]
    last = [load_checkpoint(list_checkpoints(tmp_path / name)[-1]) for name in ("whole", "halves")]
    assert all(last[1].weights[name].equal(tensor) for name, tensor in last[0].weights.items())
    average = [checkpoint.state["components"]["ema"]["weights"] for checkpoint in last]
    assert all(average[1][name].equal(tensor) for name, tensor in average[0].items())
    assert average[0]["0.weight"].dtype == torch.float32


def test_the_average_is_in_the_estimate_of_memory(tmp_path):
    def needed(**train):
        job = job_of(tmp_path, **train)
        return estimate(dataclasses.replace(job, task=dataclasses.replace(job.task, model=nn.Linear(5, 100)))).optimizer

    assert needed(ema=0.9) - needed() == 4 * (500 + 100)


@pytest.mark.parametrize("decay", [1.0, -0.1, 2.0])
def test_a_decay_that_is_none_is_refused(decay):
    with pytest.raises(ConfigError, match="ema"):
        TrainConfig(ema=decay)


class Counter(Component):
    """Counts steps on each rank; on another number of ranks, all go to rank 0."""

    name = "counter"
    is_replicated = False

    def __init__(self, job):
        self.count = 0

    def after_update(self, training, step):
        self.count += 1

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]

    def redistribute(self, states, rank):
        return {"count": sum(state["count"] for state in states)} if rank == 0 else None


def test_a_component_is_a_class_and_a_line_in_the_table(tmp_path, monkeypatch):
    monkeypatch.setattr(components, "COMPONENTS", (*components.COMPONENTS, Counter))
    fit(job_of(tmp_path))
    training = start_training(job_of(tmp_path))
    assert training.component(Counter).count == 12
    folder = list_checkpoints(tmp_path)[-1]
    assert load_checkpoint(folder).state["components"]["counter"] == [{"count": 12}]


class Two(SoloWorld):
    """A world whose rank and size are what they are said to be; makes no collectives."""

    def __init__(self, rank, size):
        super().__init__(torch.device("cpu"), Launch("none"))
        self.rank, self.size = rank, size


def test_a_window_of_other_ranks_goes_to_rank_0(tmp_path):
    saved = [{"totals": torch.tensor([1.5, 7.0]).double()}, {"totals": torch.tensor([2.0, 0.0]).double()}]
    job = job_of(tmp_path)
    windows = [MetricWindow(dataclasses.replace(job, world=Two(rank, 3))) for rank in range(3)]
    shares = [window.redistribute(saved, rank) for rank, window in enumerate(windows)]
    assert shares[0]["totals"].tolist() == [3.5, 7.0]
    assert shares[1:] == [None, None]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_norms_of_other_ranks_are_none_of_the_noise_scale(tmp_path, ranks):
    """Of two ranks each had half of the batch: one rank divided by zero, and three took a half for a third."""
    job = job_of(tmp_path)
    of_two, other = (NoiseScale(dataclasses.replace(job, world=Two(0, size))) for size in (2, ranks))
    of_two.load_state_dict({"sums": torch.tensor([6.0, 4.0, 2.0]).double()})  # as saved before it said of how many
    other.load_state_dict(of_two.state_dict())
    assert (len(other.metrics(None)), len(of_two.metrics(None))) == (2 if ranks == 2 else 0, 2)


def test_a_checkpoint_of_format_1_is_read(tmp_path):
    """What 0.1.0 saved beside each other belongs to components."""
    old = {
        "step": 4,
        "window_targets": 5,
        "skipped": 1,
        "skipped_in_a_row": 0,
        "is_evaluation_due": True,
        "optimizer": {"state": {}, "param_groups": []},
        "scaler": {"scale": 8.0},
        "windows": torch.tensor([[1.0], [2.0]]).double(),
        "norms": torch.tensor([1.0, 2.0, 3.0]).double(),
        "config": {"train": {"steps": 4}},
        "global_batch_size": 4,
        "fingerprint": "f",
    }
    new = upgraded(old, 1)
    assert [state["totals"].tolist() for state in new["components"]["window"]] == [[1.0, 5.0], [2.0, 0.0]]
    assert new["components"]["skipped_steps"] == {"in_window": 1, "in_a_row": 0}
    assert new["components"]["loss_scaler"] == {"scale": 8.0}
    assert new["components"]["noise_scale"]["sums"].tolist() == [1.0, 2.0, 3.0]
    assert (new["step"], new["is_evaluation_due"], new["fingerprint"]) == (4, True, "f")
    assert upgraded(new, 2) == new


def test_replicated_state_is_compared(tmp_path):
    training = start_training(job_of(tmp_path, ema=0.9))
    names = replicated_tensors(training, with_optimizer=False)
    assert "ema.weights.0.weight" in names
    assert "0.weight" in names
    assert not any(name.startswith("window") for name in names)


class Turned(nn.Module):
    """Complex numbers: a parameter, and a table of rotations as some models have it."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.full((3,), 0.5 + 0.5j))
        self.register_buffer("turns", torch.polar(torch.ones(3), torch.arange(3.0)), persistent=False)

    def forward(self, x):
        return (x.to(self.turns.dtype) * self.turns * self.scale).abs().sum(1, keepdim=True)


def complex_job(folder, precision):
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0)) + 1j
    data = TensorSamples(x, x.abs().sum(1, keepdim=True))

    def loss(model, batch):
        assert batch[0].dtype == model.turns.dtype
        return {"loss": (model(batch[0]) - batch[1]).square().sum()}

    task = Task(model=Turned(), train_data=data, val_data=data, loss_sums=loss)
    config = Config(train=TrainConfig(steps=2, global_batch_size=4, precision=precision), optim=OptimConfig(name="sgd"))
    return settle(task, config, SOLO, RunDirectory(folder), Lines())


@pytest.mark.parametrize(("precision", "expected"), [("fp64", torch.complex128), ("bf16-true", torch.complex64)])
def test_complex_numbers_keep_their_imaginary_part(tmp_path, precision, expected):
    job = dataclasses.replace(complex_job(tmp_path, precision), directory=None)
    training = start_training(job)
    for _ in range(2):
        train_step(job, training)
    model = training.model
    assert model.turns.dtype == model.scale.dtype == expected
    torch.testing.assert_close(model.turns.to(torch.complex64), torch.polar(torch.ones(3), torch.arange(3.0)))
    assert model.scale.imag.abs().min() > 0.1


def test_a_type_that_a_checkpoint_cannot_hold_is_refused_at_the_start(tmp_path):
    fit(complex_job(tmp_path / "a", "bf16-true"))
    with pytest.raises(ConfigError, match=r"scale is of the type torch\.complex128, which a checkpoint cannot hold"):
        fit(complex_job(tmp_path / "b", "fp64"))
    sparse = complex_job(tmp_path / "c", "fp32")
    sparse.task.model.register_buffer("graph", torch.eye(3).to_sparse())
    with pytest.raises(ConfigError, match=r"graph is of the type torch\.sparse_coo"):
        fit(sparse)


def test_ranks_on_gpus_agree_on_a_stop_every_few_batches(tmp_path):
    job = job_of(tmp_path)
    data = job.task.train_data
    job = dataclasses.replace(job, world=AskedLater(), task=dataclasses.replace(job.task, val_data=data))
    job = dataclasses.replace(job, config=dataclasses.replace(job.config, eval=EvalConfig(batch_size=1)))
    training = start_training(job)
    assert evaluate(job, training)
    asked = [name for name in job.world.started if name.endswith(".stop")]
    assert len(asked) == 2  # of 22 batches
    assert evaluate(job, training, SimpleNamespace(reason="a signal")) == {}
