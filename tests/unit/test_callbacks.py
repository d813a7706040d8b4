"""Callbacks, patience, norms by layer and gradual unfreezing: exact over resumes and ranks; what is due by epochs."""

import dataclasses

import pytest
import torch
from test_components import Lines, StoppedError
from thread_world import run_ranks
from torch import nn

import hvdtrain
from hvdtrain.data.dataset import TensorSamples
from hvdtrain.errors import ConfigError, ResumeError
from hvdtrain.process.launch import Launch
from hvdtrain.process.tracebacks import shown
from hvdtrain.rundir.directory import RunDirectory
from hvdtrain.settings import Config, EvalConfig, LogConfig, TrainConfig
from hvdtrain.settings.intervals import parse_every
from hvdtrain.trainer import Task, fit, settle
from hvdtrain.trainer.due import is_due
from hvdtrain.trainer.grad_norms import layer_of
from hvdtrain.world import SoloWorld

SOLO = SoloWorld(torch.device("cpu"), Launch("none"))
HOSTILE = [
    "",
    "0",
    "-1",
    "0epochs",
    "1e3",
    "nan",
    "inf",
    "epoch1",
    "1.5",
    "1 epoch 2",
    "٣",
    "9" * 30,
    "1epochs!",
    "1m1",
]


def job_of(run_dir, callbacks=(), world=SOLO, log=None, steps=12, rate=0.05, **sections):
    """Return a job of a small regression: 3 steps an epoch of 12 samples."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(12, 5, generator=generator)
    y = x.sin().sum(1, keepdim=True)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)

    def loss(model, batch):
        return {"loss": (model(batch[0]) - batch[1]).square().sum()}

    data = TensorSamples(x, y)
    task = Task(model=model, train_data=data, val_data=data, loss_sums=loss, callbacks=callbacks)
    config = Config(
        train=TrainConfig(steps=steps, global_batch_size=4),
        **{
            "optim": hvdtrain.OptimConfig(peak_lr=rate, schedule="constant"),
            **{"log": LogConfig(every=1), "eval": EvalConfig(every="1epoch"), **sections},
        },
    )
    return settle(task, config, world, run_dir and RunDirectory(run_dir), log or Lines())


def evaluations(job):
    return [step for step, metrics in job.log.lines if "val/loss" in metrics]


class Journal(hvdtrain.Callback):
    """Writes down what it sees."""

    def __init__(self):
        self.seen = []

    def begin(self, run):
        self.seen.append(("begin", run.step))

    def after_step(self, run):
        has_gradients = all(parameter.grad is not None for parameter in run.model.parameters())
        assert has_gradients
        assert run.optimizer.param_groups
        assert not run.is_rehearsal
        self.seen.append(("step", run.step, run.epoch))
        run.log(double=2 * run.step, tensor=torch.tensor(1.5))

    def after_evaluation(self, run, metrics):
        self.seen.append(("evaluation", run.step, metrics["val/loss"]))

    def state_dict(self):
        return {"count": len(self.seen), "total": torch.tensor(float(len(self.seen)))}

    def load_state_dict(self, state):
        self.seen.append(("load", state["count"], float(state["total"])))


@pytest.mark.parametrize(
    ("text", "interval"),
    [
        (100, (100, "steps")),
        ("7", (7, "steps")),
        ("7 steps", (7, "steps")),
        ("1epoch", (1, "epochs")),
        ("epoch", (1, "epochs")),
        (" 0.5 Epochs", (0.5, "epochs")),
        ("30s", (30, "seconds")),
        ("1h5m", (3900, "seconds")),
    ],
)
def test_intervals(text, interval):
    found = parse_every("log.every", text, seconds=True)
    assert (found.number, found.unit) == interval
    if found.unit == "seconds":
        with pytest.raises(ConfigError, match="must be steps or epochs"):
            parse_every("eval.every", text)


@pytest.mark.parametrize("text", HOSTILE)
def test_what_is_no_interval(text):
    for section in (LogConfig, EvalConfig, hvdtrain.CheckpointConfig):
        with pytest.raises(ConfigError, match="must be steps or epochs above 0, such as 100, 1epoch"):
            section(every=text)


@pytest.mark.parametrize(("every", "steps_per_epoch", "steps"), [
    ("1epoch", 3, [3, 6, 9, 12]), ("0.5epochs", 3, [2, 3, 5, 6, 8, 9, 11, 12]), ("2epoch", 3, [6, 12]),
    (5, 3, [5, 10]), ("0.1epoch", 30, [3, 6, 9, 12]), ("0.1epoch", 3, [*range(1, 13)]),
])  # fmt: skip
def test_what_is_due(every, steps_per_epoch, steps):
    interval = parse_every("eval.every", every)
    assert [step for step in range(13) if interval.is_due(step, steps_per_epoch)] == steps


def test_epochs_in_a_run(tmp_path):
    job = job_of(tmp_path, log=Lines(), checkpoint=hvdtrain.CheckpointConfig(every="2epochs", keep_last=None))
    fit(job)
    assert evaluations(job) == [3, 6, 9, 12]
    assert sorted(job.run.checkpoints.by_step()) == [3, 6, 9, 12]  # each evaluation was the best so far
    assert [metrics["train/epoch"] for _, metrics in job.log.lines[:3]] == [1 / 3, 2 / 3, 1]
    assert is_due(job, 6, "2epochs")
    assert not is_due(job, 9, "2epochs")
    assert not is_due(job, 6, None)


def test_a_line_every_so_many_seconds(tmp_path):
    job = job_of(tmp_path, steps=300)
    config = dataclasses.replace(job.config, log=LogConfig(every="1h"), eval=EvalConfig())
    job = dataclasses.replace(job, config=config)
    fit(job)
    assert [step for step, metrics in job.log.lines if "train/loss" in metrics] == [1, 300]


def test_a_callback_sees_the_run_and_goes_on_with_it(tmp_path):
    whole = Journal()
    job = job_of(tmp_path / "whole", [whole])
    fit(job)
    assert whole.seen[:5] == [("begin", 0), ("step", 1, 1 / 3), ("step", 2, 2 / 3), ("step", 3, 1.0), whole.seen[4]]
    assert whole.seen[4][:2] == ("evaluation", 3)
    assert len(whole.seen) == 1 + 12 + 4
    assert job.log.lines[0][1]["callback/double"] == 2
    assert job.log.lines[0][1]["callback/tensor"] == 1.5
    first, second = Journal(), Journal()
    with pytest.raises(StoppedError):
        fit(job_of(tmp_path / "parts", [first], log=Lines(stop_at=8)))
    fit(job_of(tmp_path / "parts", [second]))
    assert second.seen[:3] == [("begin", 6), ("load", 9, 9.0), ("step", 7, 7 / 3)]
    assert second.seen[2:] == [event for event in whole.seen if event[1] > 6]


class Enough(hvdtrain.Callback):
    """Ends the run after a step."""

    def __init__(self, step):
        self.step = step

    def after_step(self, run):
        if run.step == self.step:
            run.stop("it is enough")


def test_a_callback_ends_the_run_which_is_finished_then(tmp_path):
    job = job_of(tmp_path, [Enough(5)])
    evaluated = fit(job)
    assert evaluations(job) == [3, 5]
    assert [*job.run.checkpoints.by_step()][-1] == 5
    assert "ended at step 5 of 12: it is enough" in job.log.said
    again = job_of(tmp_path, [Enough(5)])
    assert fit(again) == evaluated
    assert "this run has finished before, at step 5: it is enough" in again.log.said


def test_patience(tmp_path):
    impatient = {"rate": 1e-12, "eval": EvalConfig(every=1, patience=2)}  # the loss cannot come down
    job = job_of(tmp_path, **impatient)
    fit(job)
    assert evaluations(job)[-1] < 12
    assert "evaluations (--eval.patience)" in " ".join(job.log.said)
    last = evaluations(job)[-1]
    again = job_of(tmp_path, **impatient)
    fit(again)
    assert f"finished before, at step {last}: no lower held-out loss" in " ".join(again.log.said)
    patient = job_of(tmp_path, rate=1e-12, eval=EvalConfig(every=1, patience=50))
    fit(patient)
    assert patient.log.lines[-1][0] == 12
    learning = job_of(tmp_path / "learning", eval=EvalConfig(every=1, patience=12))
    fit(learning)
    assert learning.log.lines[-1][0] == 12


def test_patience_counts_over_resumes(tmp_path):
    settings = {
        "rate": 1e-12,
        "eval": EvalConfig(every=2, patience=3),
        "checkpoint": hvdtrain.CheckpointConfig(every=1),
    }
    whole = job_of(tmp_path / "whole", **settings)
    fit(whole)
    with pytest.raises(StoppedError):
        fit(job_of(tmp_path / "parts", log=Lines(stop_at=5), **settings))
    parts = job_of(tmp_path / "parts", **settings)
    fit(parts)
    assert parts.log.lines[-1] == whole.log.lines[-1]
    assert whole.log.lines[-1][0] < 12


def test_norms_by_layer(tmp_path):
    assert [layer_of(name) for name in ("blocks.3.a.weight", "head.weight", "scale", "0.bias")] == [
        "blocks.3",
        "head",
        "scale",
        "0",
    ]
    job = job_of(tmp_path, log=Lines())
    job = dataclasses.replace(job, config=dataclasses.replace(job.config, log=LogConfig(every=1, grad_norms=True)))
    fit(job)
    for _, metrics in job.log.lines[:3]:
        whole = (metrics["grad_norm/0"] ** 2 + metrics["grad_norm/2"] ** 2) ** 0.5
        assert whole == pytest.approx(metrics["train/grad_norm"], rel=1e-5)


def test_gradual_unfreezing(tmp_path):
    """Layers stand still until their step, whatever weight decay and momentum do; interrupted or not."""

    class Watch(hvdtrain.Callback):
        def __init__(self):
            self.weights = {}

        def begin(self, run):
            self.after_step(run)

        def after_step(self, run):
            self.weights[run.step] = [parameter.detach().clone() for parameter in run.model.parameters()]

    def callbacks():
        return [Watch(), hvdtrain.GradualUnfreezing({"0": 5, "0.bias": 2, "2": 0})]

    whole = callbacks()
    fit(job_of(tmp_path / "whole", whole))
    weights = whole[0].weights
    moved = [
        [step for step in range(1, 13) if not torch.equal(weights[step][i], weights[step - 1][i])] for i in range(4)
    ]
    assert moved == [[*range(6, 13)], [*range(3, 13)], [*range(1, 13)], [*range(1, 13)]]
    with pytest.raises(StoppedError):
        fit(job_of(tmp_path / "parts", callbacks(), log=Lines(stop_at=5)))
    parts = callbacks()
    fit(job_of(tmp_path / "parts", parts))
    assert all(torch.equal(a, b) for a, b in zip(parts[0].weights[12], weights[12], strict=True))


@pytest.mark.parametrize(
    ("steps", "message"),
    [({"1": 3}, "no trainable parameter begins with '1'; there are 0.weight"), ({"0": -1}, "or more")],
)
def test_unfreezing_that_cannot_be(tmp_path, steps, message):
    with pytest.raises(ConfigError, match=message):
        fit(job_of(tmp_path, [hvdtrain.GradualUnfreezing(steps)]))


@pytest.mark.parametrize(
    ("callback", "message"), [(Journal, "make an object, Journal"), (object(), "has none of begin")]
)
def test_what_is_no_callback(tmp_path, callback, message):
    with pytest.raises(ConfigError, match=message):
        fit(job_of(tmp_path, [callback]))


class Renamed(hvdtrain.Callback):
    """Its state had another name when it was saved."""

    def state_dict(self):
        return {"count": 1}

    def load_state_dict(self, state):
        self.count = state["number"]


def test_a_state_that_a_callback_cannot_take_names_its_line_and_not_the_checkpoint(tmp_path):
    fit(job_of(tmp_path, [Renamed()], steps=6))
    with pytest.raises(ResumeError) as caught:
        fit(job_of(tmp_path, [Renamed()], steps=12))
    line = Renamed.load_state_dict.__code__.co_firstlineno + 1
    assert f"KeyError: 'number' ({shown(__file__)}, line {line}, in load_state_dict). Mend it" in str(caught.value)
    assert "train on with the program that wrote it" not in str(caught.value)
    assert 'state["number"]' in caught.value.stack
    for error in run_ranks(2, lambda world: refusal(tmp_path, world)):
        assert "in load_state_dict" in str(error)
        assert error.stack == caught.value.stack


def refusal(folder, world):
    with pytest.raises(ResumeError) as caught:
        fit(job_of(folder, [Renamed()], world=world, steps=12))
    return caught.value
