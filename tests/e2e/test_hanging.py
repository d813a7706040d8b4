"""Nobody is left hanging: whoever hangs or is lost is named, and whoever is left alone saves and ends."""

import contextlib
import json
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
from conftest import FAULTY as RECIPE
from conftest import LAUNCHERS, processes_naming
from patience import catches, wait_for

from hvdtrain.process.marked import training_among

pytestmark = pytest.mark.alone


@pytest.fixture
def train(hvdtrain, tmp_path):
    def train(*arguments, launcher="mpirun", ranks=2, timeout=120, **fault):
        return hvdtrain(
            *("train", RECIPE, "--run-dir", tmp_path / "run", *arguments),
            launcher=launcher,
            ranks=ranks,
            timeout=timeout,
            FAULT=json.dumps(fault),
            RUN_DIR=str(tmp_path / "run"),
        )

    return train


@pytest.fixture
def begun(start, tmp_path):
    """Start a training that takes long, and wait until it is under way; returns the launcher."""

    def begun(launcher, *more, **env):
        words = [word.format(n=2) for word in LAUNCHERS[launcher]] if launcher else []
        train = [sys.executable, "-m", "hvdtrain", "train", RECIPE, "--run-dir", tmp_path / "run"]
        process = start(*words, *train, "--train.steps", 100_000, "--pause", 0.02, *more, **env)
        wait_for(lambda: "step" in read(tmp_path / "run" / "metrics.jsonl"))
        return process

    return begun


def read(path):
    return path.read_text() if path.exists() else ""


def listening(pid):
    """Return the sockets by which a process listens for others."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    links = []
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed since the folder was read
            links.append(str(path.readlink()))
    return {row[9] for row in rows if row[3] == "0A"} & {link[8:-1] for link in links if link.startswith("socket:[")}


def newest(tmp_path):
    return read(tmp_path / "run" / "checkpoints" / "latest").strip()


@pytest.mark.parametrize(
    ("launcher", "phase", "step", "where"),
    [
        ("mpirun", "build", 0, "start"),
        ("horovodrun-gloo", "build", 0, "start"),  # whose threads talk all the time
        ("mpirun", "evaluation", 40, r"step \d+, evaluation"),
    ],
)
def test_a_hang_before_the_first_step_or_in_the_last_evaluation_is_named(train, launcher, phase, step, where):
    done = train("--health.stall-limit", "2s", launcher=launcher, kind="sleep", rank=1, phase=phase, step=step)
    assert done.code not in (0, 2, 75), done.text
    assert re.search(rf"no rank has made progress for 2 s.*rank 1 on \S+ has been at {where} for \d+ s", done.text)


def test_a_hang_after_training_is_named(train):
    done = train("--health.stall-limit", "2s", kind="sleep", rank=0, phase="end", step=0)
    assert done.code not in (0, 2, 75), done.text
    assert re.search(r"rank 0 on \S+ has been at end for \d+ s; the others wait", done.text)


def test_an_evaluation_that_hangs_in_a_run_that_has_finished_is_named(train, tmp_path, whole):
    shutil.copytree(whole, tmp_path / "run")
    done = train("--health.stall-limit", "2s", kind="sleep", rank=1, phase="evaluation", step=0)
    assert done.code not in (0, 2, 75), done.text
    assert re.search(r"rank 1 on \S+ has been at evaluation for \d+ s", done.text)


def test_long_work_before_the_first_step_is_no_hang(train):
    """Half as much again as the patience, spent on work."""
    done = train("--health.stall-limit", "2s", kind="spin", rank=1, phase="build", step=0, seconds=9)
    assert done.code == 0, done.text


def test_a_child_that_keeps_a_ranks_connections_does_not_hide_its_death(train, tmp_path):
    done = train("--pause", 0.1, kind="fork and die", rank=1, phase="forward", step=20)
    os.kill(int((tmp_path / "run" / "child").read_text()), 9)
    assert done.code not in (0, 2, 75), done.text
    assert re.search(r"rank 1 on \S+ is gone, killed or crashed", done.text)


@pytest.mark.parametrize(("launcher", "ranks", "code"), [(None, 1, 3), ("mpirun", 2, 0)])
def test_leaving_from_inside_a_recipe_is_said_and_is_no_success(train, launcher, ranks, code):
    done = train(launcher=launcher, ranks=ranks, kind="exit", rank=ranks - 1, phase="forward", step=5, code=code)
    assert done.code not in (0, 2, 3, 75), done.text
    assert re.search(
        rf"rank {ranks - 1} on \S+ was left by sys.exit\({code}\) in \S+py, .* at step 4, forward", done.text
    )


@pytest.mark.parametrize("launcher", list(LAUNCHERS))
def test_a_lost_launcher_leaves_no_rank(begun, tmp_path, launcher):
    """Killed with no chance to say anything; the reader of its pipes goes with it."""
    process = begun(launcher)
    if launcher == "mpirun":
        # Open MPI's own; the door for other ranks is closed within a second of the last one's coming.
        wait_for(lambda: all(len(listening(pid)) <= 1 for pid in training_among(processes_naming(tmp_path))))
    before = newest(tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    process.stdout.close()
    wait_for(lambda: not processes_naming(tmp_path))
    if launcher == "horovodrun-mpi":  # its mpirun is still there, and with it what ranks need to save together
        assert newest(tmp_path) > before


def test_hangup_saves(begun, tmp_path):
    process = begun(None)
    os.kill(process.pid, signal.SIGHUP)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 75, out
    assert "on request (SIGHUP, rank 0) and saved" in out


@pytest.mark.parametrize(
    ("number", "after"), [("SIGTERM", 0.0), ("SIGINT", 1.0), ("SIGUSR1", 2.5), ("SIGHUP", 0.3)], ids=lambda value: value
)
def test_a_signal_in_the_first_seconds(start, tmp_path, number, after):
    """Before there is a handler the system's own ends it; from then on it is 75, and the message says so."""
    number = signal.Signals[number]
    fault = {"kind": "sleep", "rank": 0, "phase": "build", "step": 0}
    command = [sys.executable, "-m", "hvdtrain", "train", RECIPE, "--run-dir", tmp_path / "run"]
    process = start(*command, FAULT=json.dumps(fault))
    # Python has a handler for SIGINT from the beginning.
    wait_for(lambda: catches(process.pid, signal.SIGTERM) and catches(process.pid, number))
    time.sleep(after)
    os.kill(process.pid, number)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 75, out
    assert f"stopped by {number.name}" in out
    assert "Traceback" not in out


def test_a_signal_while_a_module_is_imported_ends_at_once(start, tmp_path):
    """Whatever stands around the import: torch's own C++ would call std::terminate."""
    recipe = tmp_path / "importing.py"
    recipe.write_text(
        "import os, signal, sys\n"
        "try:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    sum(range(10_000))\n"
        "finally:\n"
        "    sys.stderr.write('unwound')\n"
        "def recipe(): ...\n"
    )
    process = start(sys.executable, "-m", "hvdtrain", "train", recipe, "--run-dir", tmp_path / "run")
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 75, out
    assert out.count("stopped by SIGTERM") == 1
    assert "unwound" not in out


def test_a_signal_to_one_rank_before_training_ends_all_with_75(start, tmp_path):
    """It waits for the other inside Horovod, where no handler of Python's runs."""
    fault = {"kind": "sleep", "rank": 1, "phase": "build", "step": 0}
    struck = tmp_path / "struck"
    command = [sys.executable, "-m", "hvdtrain", "train", RECIPE, "--run-dir", tmp_path / "run"]
    launch = [word.format(n=2) for word in LAUNCHERS["mpirun"]]
    process = start(*launch, *command, FAULT=json.dumps(fault), STRUCK=str(struck))
    wait_for(struck.exists)
    time.sleep(1)  # until the other has come as far
    os.kill(min(training_among(processes_naming(tmp_path))), signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 75, out
    assert "stopped by SIGTERM" in out
