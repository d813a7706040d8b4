"""Whatever happens to a rank, the job ends soon, says why, leaves nothing behind, and no run is lost."""

import contextlib
import json
import os
import re
import shutil
import time
from pathlib import Path

import pytest
import torch
from conftest import FAULTY as RECIPE
from conftest import processes_naming
from patience import wait_for
from safetensors.torch import load_file

pytestmark = pytest.mark.alone


@pytest.fixture
def train(hvdtrain, tmp_path):
    """Train the faulty recipe; afterwards no process and no shared memory of ours may be left."""

    def train(*arguments, launcher="mpirun", ranks=2, name="run", timeout=120, **fault):
        run_dir = tmp_path / name
        before = shared_memory()
        done = hvdtrain(
            *("train", RECIPE, "--run-dir", run_dir, *arguments),
            launcher=launcher,
            ranks=ranks,
            timeout=timeout,
            FAULT=json.dumps(fault),
            RUN_DIR=str(run_dir),
        )
        wait_for(lambda: not processes_naming(tmp_path), what=lambda: processes_naming(tmp_path))  # some may just end
        wait_for(lambda: not (shared_memory() - before), what=lambda: shared_memory() - before)
        return done

    return train


def shared_memory():
    names = set()
    for path in Path("/dev/shm").iterdir():
        with contextlib.suppress(OSError):
            if path.stat().st_uid == os.geteuid():
                names.add(path.name)
    return names


def checkpoints(run_dir):
    return sorted(int(path.name[5:]) for path in (run_dir / "checkpoints").glob("step-*"))


def weights(run_dir, step=40):
    return load_file(run_dir / "checkpoints" / f"step-{step:08d}" / "model.safetensors")


def assert_same_run(one, other):
    torch.testing.assert_close(weights(one), weights(other), rtol=0, atol=0)
    logs = []
    for run_dir in (one, other):
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        kept = [{k: v for k, v in line.items() if k.split("/")[0] in ("step", "train", "val")} for line in lines]
        logs.append(kept)
    assert logs[0] == logs[1]


def plain(text):
    """Return output without the prefixes by which launchers name ranks."""
    return re.sub(r"^\[[\d,]+\]<std(out|err)>: ?", "", text, flags=re.MULTILINE)


@pytest.mark.parametrize(
    ("launcher", "rank", "phase"),
    [
        ("mpirun", "all", "data"),
        ("horovodrun-gloo", 1, "backward"),
    ],
)
def test_an_exception_is_told_once_by_name(train, launcher, rank, phase):
    done = train(launcher=launcher, kind="raise", rank=rank, phase=phase, step=8)
    assert done.code not in (0, 2, 75), done.text
    assert done.text.count("Traceback (most recent call last)") == 1, done.text
    assert done.text.count(f"ValueError: bad luck in {phase}") == 2  # in the sentence, and below his part of the stack
    assert "Horovod has been shut down" not in done.text
    who = "[01]" if rank == "all" else rank
    says = rf"hvdtrain: rank {who} on \S+ failed at step 7, {phase}: ValueError: bad luck in {phase}"
    assert re.search(says + r" \(.*, line \d+, in \w+\)$", plain(done.text), re.MULTILINE)
    assert "hvdtrain/trainer" not in done.text


@pytest.mark.parametrize("kind", ["StopRequested", "DivergedError"])
def test_an_error_of_hvdtrains_that_one_rank_alone_raises_ends_the_job(train, kind):
    """It says what all ranks raise together where hvdtrain raises it; the others wait for a rank that has left."""
    done = train("--health.stall-limit", "100s", launcher="mpirun", kind=kind, rank=1, phase="forward", step=8)
    assert done.code == 1, done.text
    assert re.search(r"hvdtrain: rank 1 on \S+: bad luck in forward", done.text)


@pytest.mark.parametrize("launcher", ["mpirun", "horovodrun-gloo"])
def test_a_killed_rank_ends_the_job(train, launcher):
    done = train("--pause", 0.1, launcher=launcher, kind="kill", rank=1, phase="forward", step=20)
    assert done.code not in (0, 2, 75), done.text
    assert re.search(r"hvdtrain: rank 1 on \S+ is gone, killed or crashed: it was last seen at step \d+", done.text)
    assert "Traceback" not in done.text


@pytest.mark.parametrize("launcher", ["mpirun", "horovodrun-gloo"])
def test_a_rank_that_sleeps_in_its_loader_is_found(train, tmp_path, launcher):
    done = train("--health.stall-limit", "3s", launcher=launcher, kind="sleep", rank=1, phase="data", step=8)
    assert done.code not in (0, 2, 75), done.text
    assert done.text.count("no rank has made progress for 3 s") == 1, done.text
    assert re.search(r"rank 1 on \S+ has been at step 7, data for \d+ s; the others wait", done.text)
    logs = [(tmp_path / "run" / "logs" / f"rank-00{rank}.log").read_text() for rank in (0, 1)]
    assert "faulty_recipe.py" in logs[1].split("stacks of all threads")[1]  # where it sleeps
    assert "synchronize" in logs[0].split("stacks of all threads")[1]  # where it waits


@pytest.mark.parametrize(("launcher", "rank"), [("mpirun", 0), ("horovodrun-gloo", 1)])
def test_a_stopped_rank_is_missed(train, launcher, rank):
    arguments = ["--health.stall-limit", "3s", "--pause", 0.1]
    done = train(*arguments, launcher=launcher, kind="stop", rank=rank, phase="forward", step=20)
    assert done.code not in (0, 2, 75), done.text
    assert re.search(rf"rank {rank} on \S+ has given no sign of life for \d+ s.*last seen at step \d+", done.text)


def test_one_process_that_hangs_notices_it_itself(train):
    arguments = ["--health.stall-limit", "2s"]
    done = train(*arguments, launcher=None, ranks=1, kind="sleep", rank=0, phase="evaluation", step=10)
    assert done.code == 1, done.text
    assert re.search(r"rank 0 on \S+ has been at step 9, evaluation", done.text)


def test_what_is_not_finite_on_one_rank_is_skipped_by_all(train, tmp_path):
    done = train(launcher="horovodrun-gloo", kind="nan", rank=1, phase="backward", step=7, until=8)
    assert done.code == 0, done.text
    for step in (7, 8):
        said = f"WARNING: step {step} is skipped on all ranks: the gradient is not finite"
        assert done.text.count(said) == 1, done.text
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {line["step"]: line["train/skipped_steps"] for line in lines if "train/skipped_steps" in line} == {8: 2}
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "run").values())


def test_too_many_in_a_row_end_the_run_and_the_checkpoint_is_good(train, tmp_path, whole):
    arguments = ["--health.max-skipped-steps", 3]
    done = train(*arguments, kind="nan", rank=0, phase="forward", step=11, until=40)
    assert done.code == 1, done.text
    assert "3 steps in a row were skipped, up to step 13: the loss on rank 0 is not finite" in done.text
    assert "Traceback" not in done.text
    assert checkpoints(tmp_path / "run") == [5, 10]
    assert train().code == 0  # the fault gone, the same command goes on
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize(
    "fault", [{"kind": "full disk", "bytes": 3000}, {"kind": "read-only"}], ids=["full", "read-only"]
)
def test_a_save_that_fails_does_not_end_the_run(train, tmp_path, fault):
    arguments = ["--width", 64, "--log.every", 50]
    done = train(*arguments, launcher=None, ranks=1, rank=0, phase="forward", step=8, until=13, **fault)
    assert done.code == 0, done.text
    assert done.text.count("could not be written") == 1, done.text
    assert "training goes on, the next save tries again" in done.text
    assert checkpoints(tmp_path / "run") == [5, 15, 20, 25, 30, 35, 40]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum(line.get("checkpoint/failed", 0) for line in lines) == 1


def test_damaged_checkpoints_are_passed_over(train, tmp_path, whole):
    """The newest one with a changed bit, the one before cut short, the one before that without its weights."""
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    for step in (25, 30, 35, 40):
        shutil.rmtree(run_dir / "checkpoints" / f"step-{step:08d}")
    paths = {step: run_dir / "checkpoints" / f"step-{step:08d}" / "model.safetensors" for step in (20, 15, 10)}
    data = bytearray(paths[20].read_bytes())
    data[len(data) // 2] ^= 4
    paths[20].write_bytes(data)
    paths[15].write_bytes(paths[15].read_bytes()[:-7])
    paths[10].unlink()
    done = train()
    assert done.code == 0, done.text
    for step in paths:
        assert re.search(rf"warning: .*step-{step:08d}.*; trying the one before it", done.text), done.text
    assert_same_run(run_dir, whole)


def test_a_signal_in_any_phase_stops_and_goes_on(train, tmp_path, whole):
    """Stopped three times; dropout, best-so-far, metrics: all bitwise as if nothing had happened.

    First while a thread still writes a checkpoint.
    """
    begun = 0
    for number, rank, phase, at in (
        ("SIGUSR1", 0, "data", 11),
        ("SIGTERM", 1, "backward", 20),
        ("SIGTERM", 1, "evaluation", 30),
    ):
        done = train(kind="signal", signal=number, rank=rank, phase=phase, step=at - begun)
        assert done.code == 75, done.text
        # An evaluation is cut short, and made up for when the run goes on.
        stopped = re.search(rf"stopped at step (\d+) of 40 on request \({number}, rank {rank}\)", done.text)
        assert stopped, done.text
        begun = int(stopped[1])
        assert at <= begun <= at + 1
        assert checkpoints(tmp_path / "run")[-1] == begun
    done = train()
    assert done.code == 0, done.text
    assert_same_run(tmp_path / "run", whole)
    best = [(path / "checkpoints" / "best").read_text() for path in (tmp_path / "run", whole)]
    assert best[0] == best[1]


def test_a_second_sigint_stops_at_once(start, tmp_path):
    """Even while the rank waits inside Horovod for one that sleeps."""
    command = ["python", "-m", "hvdtrain", "train", RECIPE, "--run-dir", tmp_path / "run", "--train.steps", 100000]
    struck, fault = tmp_path / "struck", '{"kind": "sleep", "rank": 1, "step": 30}'
    process = start("mpirun", "--oversubscribe", "-np", 2, *command, FAULT=fault, STRUCK=str(struck))
    wait_for(struck.exists)
    pid = json.loads((tmp_path / "run" / "environment.json").read_text())["ranks"][0]["pid"]
    for _ in range(2):
        time.sleep(1)
        os.kill(pid, 2)
    out, _ = process.communicate(timeout=120)
    assert process.returncode not in (0, 2, 75), out


def test_a_run_goes_on_with_other_numbers_of_ranks(train, tmp_path):
    """1 -> 4 -> 2 in fp64, with dropout: the same weights, the same samples, no gap in the metrics."""
    exact = ["--train.precision", "fp64"]
    for ranks, steps in ((1, 13), (4, 27), (2, 40)):
        launcher = "mpirun" if ranks > 1 else None
        done = train(*exact, "--train.steps", steps, launcher=launcher, ranks=ranks)
        assert done.code == 0, done.text
        assert "= global batch 16" in done.text
    assert train(*exact, launcher=None, ranks=1, name="whole").code == 0
    one, other = weights(tmp_path / "run"), weights(tmp_path / "whole")
    assert max((one[name] - other[name]).abs().max() for name in other) < 1e-12


def test_a_change_can_be_allowed_by_name(train, tmp_path, whole):
    """Other numbers of ranks, and other settings, for a run that two ranks have begun."""
    shutil.copytree(whole, tmp_path / "run")
    change = ["--train.steps", 45, "--optim.peak-lr", "0.02", "--dropout", "0.1"]
    refused = train(*change, launcher=None, ranks=1)
    assert refused.code == 2
    assert "dropout was 0.2 and is 0.1 now; optim.peak_lr was 0.01 and is 0.02 now" in refused.text
    allowed = train(*change, "--allow-config-change", "optim.peak-lr", "dropout", launcher=None, ranks=1)
    assert allowed.code == 0, allowed.text


def test_ranks_with_different_settings_are_refused(hvdtrain, tmp_path):
    (tmp_path / "seeded.py").write_text(
        RECIPE.read_text() + "\n\nbase = recipe\n\n\ndef recipe():\n"
        "    import dataclasses\n"
        "    own = base()\n"
        "    seed = int(os.environ.get('OMPI_COMM_WORLD_RANK', 0))\n"
        "    return dataclasses.replace(own, train=dataclasses.replace(own.train, seed=seed))\n"
    )
    done = hvdtrain("train", "seeded.py", launcher="mpirun", ranks=2)
    assert done.code == 2, done.text
    assert "rank 1 was given other settings than rank 0" in done.text
