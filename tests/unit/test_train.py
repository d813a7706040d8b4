"""`hvdtrain.train`: the entry for programs and notebooks."""

import json
import os
import signal
from dataclasses import dataclass

import pytest
import torch

import hvdtrain


@dataclass(frozen=True, kw_only=True)
class Line(hvdtrain.Recipe):
    """A straight line through points."""

    fails: bool = False
    """Raise in the middle."""
    stops: bool = False
    """Ask for a stop in the middle."""

    def build(self, say):
        x = torch.linspace(-1, 1, 20).unsqueeze(1)
        torch.manual_seed(self.train.seed)
        model = torch.nn.Linear(1, 1)
        batches = iter(range(100))

        def loss_sums(model, batch):
            count = next(batches)
            if self.fails and count == 3:
                raise ValueError("bad luck")
            if self.stops and count == 3:
                signal.raise_signal(signal.SIGTERM)
            return {"loss": (model(batch[0]) - batch[1]).square().sum()}

        data = hvdtrain.TensorSamples(x, 3 * x)
        return hvdtrain.Task(model=model, train_data=data, val_data=data, loss_sums=loss_sums)


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Put back the variables that a start sets for its process."""
    for name in ("HOROVOD_FUSION_THRESHOLD", "MKL_NUM_THREADS", "OMPI_MCA_mpi_yield_when_idle"):
        monkeypatch.setenv(name, os.environ.get(name, "0"))


RECIPE = Line(train=hvdtrain.TrainConfig(steps=8, global_batch_size=10))


def test_it_returns_what_was_reached(tmp_path, capsys):
    result = hvdtrain.train(RECIPE, run_dir=tmp_path / "run", train={"steps": 9}, optim={"name": "sgd", "peak-lr": 0.1})
    assert (result.step, result.run_dir) == (9, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["event"] == "finished"
    assert result.metrics == {"val/loss": lines[-1]["val/loss"]}
    assert "finished in" in capsys.readouterr().out
    again = hvdtrain.train(
        RECIPE, run_dir=str(tmp_path / "run"), train={"steps": 9}, optim={"name": "sgd", "peak_lr": 0.1}
    )
    assert again.metrics == result.metrics


def test_a_file_of_settings_and_two_that_fix_the_batch(tmp_path):
    (tmp_path / "settings.toml").write_text("[train]\nsteps = 3\nmicro-batch-size = 2\n")
    result = hvdtrain.train(
        RECIPE,
        run_dir=tmp_path / "run",
        config=tmp_path / "settings.toml",
        train={"accum_steps": 2, "max_grad_norm": None},
    )
    assert result.step == 3
    settings = (tmp_path / "run" / "config.toml").read_text()
    assert "accum_steps = 2" in settings
    assert "global_batch_size" not in settings
    assert "max_grad_norm" not in settings


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"train": {"stepz": 3}}, r"there is no setting 'train.stepz'; did you mean 'train.steps'\?"),
        ({"trane": {"steps": 3}}, "did you mean 'train'"),
        ({"train": {"steps": -1}}, "greater than 0"),
        ({"train": 3}, "'train' is a section"),
        ({"config": "nowhere.toml"}, "nowhere.toml cannot be read"),
        ({"train": {"global_batch_size": 3, "micro_batch_size": 2}}, "divide"),
    ],
)
def test_wrong_settings_are_raised_and_nothing_is_left(tmp_path, settings, says):
    with pytest.raises(hvdtrain.ConfigError, match=says):
        hvdtrain.train(RECIPE, run_dir=tmp_path / "runs" / "run", **settings)
    assert [*tmp_path.iterdir()] == []


def test_a_stop_is_raised_and_the_same_call_continues(tmp_path):
    with pytest.raises(hvdtrain.StopRequested, match=r"stopped at step \d of 8 on request \(SIGTERM"):
        hvdtrain.train(RECIPE, run_dir=tmp_path / "run", stops=True)
    result = hvdtrain.train(RECIPE, run_dir=tmp_path / "run", allow_config_change=("stops",))
    whole = hvdtrain.train(RECIPE, run_dir=tmp_path / "whole")
    assert result == hvdtrain.TrainResult(whole.metrics, tmp_path / "run", 8)


def test_a_users_exception_reaches_the_program(tmp_path):
    """The process is not ended under a notebook; the directory is free again."""
    with pytest.raises(ValueError, match="bad luck"):
        hvdtrain.train(RECIPE, run_dir=tmp_path / "run", fails=True)
    assert hvdtrain.train(RECIPE, run_dir=tmp_path / "run").step == 8
