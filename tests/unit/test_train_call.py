"""`hvdtrain.train`: the entry for programs and notebooks."""

import dataclasses
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import hvdtrain
from hvdtrain.process.job import start_ranks
from hvdtrain.recipes import load_recipe
from hvdtrain.recipes.given import in_sections
from hvdtrain.rundir import checkpoint as one
from hvdtrain.trainer import precision, saver


@dataclass(frozen=True, kw_only=True)
class Line(hvdtrain.Recipe):
    """A straight line through points."""

    fails: bool = False
    """Raise in the middle."""
    stops: bool = False
    """Ask for a stop in the middle."""
    breaks_at: int = 1_000
    """Steps before the first whose loss is not finite."""
    counts: bool = False
    """Have a callback that counts steps."""

    def build(self, say):
        x = torch.linspace(-1, 1, 20).unsqueeze(1)
        torch.manual_seed(self.train.seed)
        model = torch.nn.Linear(1, 1)
        batches = itertools.count()

        def loss_sums(model, batch):
            count = next(batches) if model.training else -1  # the check of the first batch is none of the steps
            if self.fails and count == 3:
                raise ValueError("bad luck")
            if self.stops and count == 3:
                signal.raise_signal(signal.SIGTERM)
            loss = (model(batch[0]) - batch[1]).square().sum()
            return {"loss": loss * float("nan") if count >= self.breaks_at else loss}

        data = hvdtrain.TensorSamples(x, 3 * x)
        callbacks = [Counting()] if self.counts else []
        return hvdtrain.Task(model=model, train_data=data, val_data=data, loss_sums=loss_sums, callbacks=callbacks)


class Counting:
    """A callback that goes on counting."""

    count = 0

    def after_step(self, run):
        self.count += 1

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


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


def test_short_and_full_names(tmp_path):
    """`hvdtrain.train("lm", steps=100)`, as the command line has it, beside sections."""
    given = {"steps": 4, "lr": 0.1, "optim": {"name": "sgd"}, "batch-size": 8, "seed": 3, "log.every": 2}
    assert hvdtrain.train(RECIPE, run_dir=tmp_path / "run", **given).step == 4
    settings = (tmp_path / "run" / "config.toml").read_text()
    for line in ("steps = 4", "peak_lr = 0.1", 'name = "sgd"', "global_batch_size = 8", "seed = 3", "every = 2"):
        assert line in settings.splitlines()
    recipe = load_recipe("lm")
    assert in_sections({"data": "text", "model": {"hidden_size": 8}, "workers": 1}, recipe) == {
        "data": {"path": "text", "workers": 1},
        "model": {"hidden_size": 8},
    }
    assert in_sections({"data": "images", "model": "resnet18"}, load_recipe("resnet")) == {
        "data": {"root": "images"},
        "model": {"name": "resnet18"},
    }


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
    assert 'global_batch_size = "none"' in settings
    assert 'max_grad_norm = "none"' in settings


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"train": {"stepz": 3}}, r"there is no setting 'train.stepz'; did you mean 'train.steps'\?"),
        ({"trane": {"steps": 3}}, "did you mean 'train'"),
        ({"train": {"steps": -1}}, "greater than 0"),
        ({"train": 3}, "'train' is a section"),
        ({"config": "nowhere.toml"}, "nowhere.toml cannot be read"),
        ({"learning_rate": 0.1}, r"there is no setting 'learning_rate'; did you mean 'optim.peak_lr'\?"),
        ({"num_epochs": 3}, r"did you mean 'train.epochs'\?"),
        ({"steps": -1}, r"train\.steps.* greater than 0"),
        ({"train": {"global_batch_size": 3, "micro_batch_size": 2}}, "divide"),
    ],
)
def test_wrong_settings_are_raised_and_nothing_is_left(tmp_path, settings, says):
    with pytest.raises(hvdtrain.ConfigError, match=says):
        hvdtrain.train(RECIPE, run_dir=tmp_path / "runs" / "run", **settings)
    assert [*tmp_path.iterdir()] == []


def test_a_path_will_do_and_other_things_are_refused(tmp_path):
    recipe = tmp_path / "odd.py"
    recipe.write_text("recipe = 3\n")
    with pytest.raises(hvdtrain.ConfigError, match=r"odd\.py"):
        hvdtrain.train(recipe)
    with pytest.raises(hvdtrain.ConfigError, match="not int"):
        hvdtrain.train(3)


def test_a_stop_is_raised_and_the_same_call_continues(tmp_path):
    with pytest.raises(hvdtrain.StopRequested, match=r"stopped at step \d of 8 on request \(SIGTERM"):
        hvdtrain.train(RECIPE, run_dir=tmp_path / "run", stops=True)
    result = hvdtrain.train(RECIPE, run_dir=tmp_path / "run", allow_config_change=("stops",))
    whole = hvdtrain.train(RECIPE, run_dir=tmp_path / "whole")
    assert result == hvdtrain.TrainResult(whole.metrics, tmp_path / "run", 8)


@pytest.mark.parametrize(
    ("before", "after", "dropped"),
    [
        ({"train.ema": 0.9}, {}, "ema"),
        ({"train.ema": 0.9, "eval.patience": 9}, {}, "early_stopping, ema"),
        ({"train.ema": 0.9}, {"train.ema": 0.9}, None),
        ({"train.ema": 0.9}, {"train.ema": 0.8}, None),
        ({}, {"train.ema": 0.9}, None),
        ({"counts": True}, {}, r"callback\.Counting\.1"),
        ({"counts": True}, {"counts": True}, None),
    ],
)
def test_what_a_run_that_goes_on_has_no_use_for_is_named(tmp_path, capsys, before, after, dropped):
    """By its settings, such as an average of weights, or by a user's own code, such as a callback."""
    every = {"eval.every": 2}
    with pytest.raises(hvdtrain.StopRequested):
        hvdtrain.train(RECIPE, run_dir=tmp_path / "run", stops=True, **every, **before)
    changed = ("stops", "counts", "train.ema", "eval.patience")
    capsys.readouterr()
    hvdtrain.train(RECIPE, run_dir=tmp_path / "run", allow_config_change=changed, **every, **after)
    said = capsys.readouterr().out
    assert said.count("the checkpoint also holds") == (dropped is not None), said
    if dropped:
        assert re.search(f"holds the state of {dropped}: .*it is dropped", said)


def test_a_users_exception_reaches_the_program(tmp_path):
    """The process is not ended under a notebook; the directory is free again."""
    with pytest.raises(ValueError, match="bad luck"):
        hvdtrain.train(RECIPE, run_dir=tmp_path / "run", fails=True)
    assert hvdtrain.train(RECIPE, run_dir=tmp_path / "run").step == 8


ODD = KeyError("odd")


def breaking_saves(monkeypatch, *broken, error=ODD):
    """Let some saves, counted from 1, fail as no file system would."""
    save, count = one.safetensors.torch.save_file, itertools.count(1)

    def save_file(*arguments):
        if next(count) in broken:
            raise error
        return save(*arguments)

    monkeypatch.setattr(one.safetensors.torch, "save_file", save_file)


def test_a_run_whose_last_save_failed_has_failed(tmp_path, monkeypatch):
    breaking_saves(monkeypatch, 2, 3)  # at the end there are two: before and after the evaluation
    with pytest.raises(hvdtrain.CheckpointError, match="KeyError: 'odd'"):
        hvdtrain.train(RECIPE, run_dir=tmp_path / "run", checkpoint={"every": 4})
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step-00000004\n"
    assert hvdtrain.train(RECIPE, run_dir=tmp_path / "run", checkpoint={"every": 4}).step == 8


@pytest.mark.parametrize("error", [SystemExit(0), KeyboardInterrupt(), GeneratorExit()], ids=repr)
def test_not_even_an_exit_in_the_thread_that_saves_passes_for_a_save(tmp_path, monkeypatch, error):
    breaking_saves(monkeypatch, 2, 3, error=error)
    with pytest.raises(hvdtrain.CheckpointError, match=type(error).__name__):
        hvdtrain.train(RECIPE, run_dir=tmp_path / "run", checkpoint={"every": 4})


def test_without_memory_for_a_copy_or_a_thread_training_goes_on(tmp_path, monkeypatch, capsys):
    copy, start, count = saver.to_host, threading.Thread.start, itertools.count(1)

    def copy_once_in_vain(tensor):
        if next(count) == 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return copy(tensor)

    def start_no_saver(thread):
        if thread.name == "hvdtrain-save":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(saver, "to_host", copy_once_in_vain)
    monkeypatch.setattr(threading.Thread, "start", start_no_saver)
    assert hvdtrain.train(RECIPE, run_dir=tmp_path / "run", checkpoint={"every": 4}).step == 8
    assert capsys.readouterr().out.count("could not be copied to host memory") == 1
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step-00000008\n"


def test_a_save_that_failed_is_forgiven_when_a_later_one_succeeds(tmp_path, monkeypatch, capsys):
    breaking_saves(monkeypatch, 1)
    assert hvdtrain.train(RECIPE, run_dir=tmp_path / "run", checkpoint={"every": 4}).step == 8
    assert capsys.readouterr().out.count("could not be written (KeyError: 'odd')") == 1
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == [
        *("best", "latest", "step-00000008")
    ]


def test_losses_that_are_not_finite_name_the_good_checkpoints(tmp_path):
    bad = dataclasses.replace(RECIPE, breaks_at=4)
    settings = {"checkpoint": {"every": 2, "keep_last": 1}, "health": {"max_skipped_steps": 10}, "train": {"steps": 20}}
    with pytest.raises(hvdtrain.DivergedError, match=r"Good checkpoints in \S+checkpoints: of step 4; those of step"):
        hvdtrain.train(bad, run_dir=tmp_path / "run", **settings)
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert kept == ["step-00000004", "step-00000012"]


SHORT = """
import faulthandler, runpy, sys, hvdtrain
faulthandler.dump_traceback_later(100, exit=True)
recipe = runpy.run_path(sys.argv[1])["RECIPE"]
hvdtrain.train(recipe, run_dir=sys.argv[2], train={"steps": 300}, log={"every": 1})
sys.stderr.write("done")
"""


def test_a_closed_output_ends_no_run(tmp_path):
    """`python mine.py | head -1`, from the first line on."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", SHORT, __file__, tmp_path / "run"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writer)
    assert (done.returncode, done.stderr[-4:]) == (0, "done"), done.stderr
    assert "finished in" in (tmp_path / "run" / "logs" / "rank-000.log").read_text()


@pytest.mark.parametrize("words", [["--version"], ["nonsense"], ["train", "--help"]])
def test_a_process_without_standard_streams_ends_as_any_other(words):
    """`>&- 2>&-`, as some daemons start programs: Python has None for these streams."""
    code = 0 if words != ["nonsense"] else 2
    command = [sys.executable, "-m", "hvdtrain", *words]
    for closed in (">&-", "<&- >&- 2>&-"):
        done = subprocess.run(
            ["sh", "-c", f'"$@" {closed}', "sh", *command], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr


def test_own_sinks_are_given_the_metrics(tmp_path):
    class Kept:
        lines = []  # noqa: RUF012

        def begin(self, step, num_steps):
            self.lines.append((step, num_steps))

        def write(self, step, metrics, event):
            self.lines.append((step, event))

        def close(self):
            self.lines.append("closed")

    @dataclass(frozen=True, kw_only=True)
    class WithSink(Line):
        def build(self, say):
            return dataclasses.replace(super().build(say), sinks=(Kept(),))

    hvdtrain.train(WithSink(train=RECIPE.train), run_dir=tmp_path / "run")
    assert Kept.lines == [(0, 8), (8, None), (8, "finished"), "closed"]


@pytest.mark.parametrize(("is_fast", "expected"), [(True, "bf16"), (False, "fp32")])
def test_auto_is_written_down_as_what_it_came_to(monkeypatch, tmp_path, capfd, is_fast, expected):
    monkeypatch.setattr(precision, "is_fast_in_bf16", lambda device: is_fast)
    hvdtrain.train(RECIPE, run_dir=tmp_path, train={"precision": "auto"})
    assert f"precision:  {expected}, by --train.precision auto" in capfd.readouterr().out
    assert f'precision = "{expected}"' in (tmp_path / "config.toml").read_text()
    monkeypatch.setattr(precision, "is_fast_in_bf16", lambda device: not is_fast)  # on another machine
    with pytest.raises(hvdtrain.UsageError, match=r"train\.precision"):
        hvdtrain.train(RECIPE, run_dir=tmp_path, train={"precision": "auto", "steps": 9})


def test_np_starts_programs_of_ones_own(tmp_path, monkeypatch, capfd):
    """`hvdtrain -np N python program.py`, as launchers do; what has no function `recipe` is not run by `train`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text("import sys\nprint('ran', *sys.argv[1:])\nsys.exit(3)\n")
    assert start_ranks(["1", "python", "own.py", "--lr", "3"]) == 3
    assert capfd.readouterr().out == "ran --lr 3\n"
    with pytest.raises(hvdtrain.ConfigError, match=r"own\.py defines no function 'recipe'.*hvdtrain -np 2 python own"):
        load_recipe("own.py")
    assert capfd.readouterr().out == ""
    (tmp_path / "own.py").write_text("print(\n")
    with pytest.raises(hvdtrain.ConfigError, match="is not Python"):
        load_recipe("own.py")


@dataclass(frozen=True, kw_only=True)
class Moving(Line):
    """One whose callback does something to the run in the middle."""

    act: str = ""
    """What it does."""

    def build(self, say):
        return dataclasses.replace(super().build(say), callbacks=[Act(self.act)])


class Act(hvdtrain.Callback):
    """Does it after three steps."""

    def __init__(self, what):
        self.what = what

    def after_step(self, run):
        from patience import wait_for_saves  # here: a process of its own runs this file, without tests/support

        if run.step == 3:
            wait_for_saves()  # rmtree fails on a file that comes meanwhile, and the save on a folder that has gone
            {
                "chdir": lambda: os.chdir("elsewhere"),
                "remove": lambda: shutil.rmtree("run"),
                "move": lambda: Path("run").rename("moved"),
            }[self.what]()


@pytest.fixture
def moving(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()

    def train(act):
        settings = {"train": hvdtrain.TrainConfig(steps=6, global_batch_size=10)}
        settings |= {"log": hvdtrain.LogConfig(every=1), "checkpoint": hvdtrain.CheckpointConfig(every=2)}
        return hvdtrain.train(Moving(act=act, **settings), run_dir="run")

    return train


def test_a_relative_directory_stays_where_it_was(moving, tmp_path):
    """Although the recipe's own code goes elsewhere in mid-run."""
    result = moving("chdir")
    assert result.run_dir == tmp_path / "run"
    assert not list((tmp_path / "elsewhere").iterdir())
    assert '"finished"' in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*"))[-1] == "step-00000006"


@pytest.mark.parametrize("act", ["remove", "move"])
def test_a_directory_that_is_taken_away_is_said_once(moving, tmp_path, capsys, act):
    moving(act)
    assert capsys.readouterr().out.count("was moved or removed while it was trained") == 1
    assert (tmp_path / "run" / "checkpoints" / "step-00000006").is_dir()
    kept = tmp_path / ("run" if act == "remove" else "moved") / "metrics.jsonl"
    assert '"finished"' in kept.read_text()


def test_a_run_that_was_killed_before_its_last_line_gets_it(tmp_path):
    settings = {"train": hvdtrain.TrainConfig(steps=4, global_batch_size=10)}
    hvdtrain.train(Line(**settings), run_dir=tmp_path / "run")
    metrics = tmp_path / "run" / "metrics.jsonl"
    whole = metrics.read_text().splitlines()
    metrics.write_text("".join(f"{line}\n" for line in whole[:-1]))
    for _ in range(2):
        hvdtrain.train(Line(**settings), run_dir=tmp_path / "run")
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
        assert [line.get("event") for line in lines[-2:]] == [None, "finished"] or len(lines) == 1
        assert lines[-1]["event"] == "finished"
        assert sum("event" in line for line in lines) == 1


def test_a_run_does_not_lie_among_its_own_texts(tmp_path):
    """Started again it would have been refused: its logs were texts of it by then."""
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(f"a text of number {i}\n" * 40)
    data = {"path": str(tmp_path), "sequence_length": 8, "cache_dir": str(tmp_path / ".cache")}
    with pytest.raises(
        hvdtrain.ConfigError, match=r"--run-dir .* is the directory of --data.path, too: choose another"
    ):
        hvdtrain.train("lm", run_dir=tmp_path, data=data, train={"steps": 1})
    assert sorted(path.name for path in tmp_path.iterdir()) == [".cache", "0.txt", "1.txt", "2.txt"]
    words = ["train", "lm", "--data.path", str(tmp_path), "--data.cache-dir", str(tmp_path / ".cache"), "--dry-run"]
    words += ["--data.sequence-length", "8", "--run-dir", str(tmp_path)]
    done = subprocess.run([sys.executable, "-m", "hvdtrain", *words], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr.count("is the directory of --data.path, too")) == (2, 1)
