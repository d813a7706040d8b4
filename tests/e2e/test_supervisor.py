"""The supervisor starts a run again until it has finished, and leaves nothing behind."""

import json
import os
import signal
import sys
import time

import pytest
import torch
from conftest import FAULTY as RECIPE
from conftest import LAUNCHERS, processes_naming
from patience import wait_for
from safetensors.torch import load_file

pytestmark = pytest.mark.alone

SUPERVISE = [sys.executable, "-m", "hvdtrain.process.supervise"]

# Ends with the next of the given exit codes at each start; a checkpoint appears where the code is followed by "+".
STAND_IN = """
import os, pathlib, sys
run_dir, *codes = sys.argv[2:]
starts = pathlib.Path(run_dir, "starts")
number = len(starts.read_text()) if starts.exists() else 0
pathlib.Path(run_dir, "checkpoints").mkdir(parents=True, exist_ok=True)
starts.write_text("x" * (number + 1))
code = codes[min(number, len(codes) - 1)]
if code.endswith("+"):
    pathlib.Path(run_dir, "checkpoints", "latest").write_text(str(number))
code = code.rstrip("+")
os.kill(os.getpid(), 9) if code == "killed" else sys.exit(int(code))
"""


@pytest.mark.parametrize(
    ("codes", "options", "expected", "starts"),
    [
        (["1", "killed", "75", "0"], [], 0, 4),
        (["2", "0"], [], 2, 1),
        (["1"], ["--max-restarts", "2"], 1, 3),
        (["1+", "1+", "1+", "killed+", "0"], ["--max-restarts", "1"], 0, 5),  # progress: the count begins again
        (["75"], [], 75, 3),  # never any progress
        (["75+", "0"], ["--no-restart-after-stop"], 75, 1),
        (["killed"], ["--max-restarts", "0"], 1, 1),
    ],
)
def test_which_exit_codes_start_it_again(run, tmp_path, codes, options, expected, starts):
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    command = [sys.executable, "stand_in.py", "--run-dir", "run", *codes]
    done = run(*SUPERVISE, "--pause", "0.01", *options, "--", *command)
    assert done.code == expected, done.text
    assert len((tmp_path / "run" / "starts").read_text()) == starts
    assert "Traceback" not in done.text


def test_mistakes_are_one_message(run):
    for command, says in (
        ([], "give the command"),
        (["true"], "--run-dir"),
        (["no-such", "--run-dir", "x"], "no-such"),
    ):
        done = run(*SUPERVISE, "--", *command)
        assert done.code == 2
        assert says in done.err
        assert "Traceback" not in done.err


@pytest.mark.parametrize("launcher", ["mpirun", "horovodrun-gloo"])
def test_a_killed_rank_costs_nothing(run, tmp_path, whole, launcher):
    """Killed under MPI and under Gloo, and not at all: two numbers have one sum, whoever adds them."""
    fault = {"kind": "kill", "rank": 1, "phase": "backward", "step": 23}
    launch = [word.format(n=2) for word in LAUNCHERS[launcher]]
    train = [*launch, sys.executable, "-m", "hvdtrain", "train", RECIPE, "--run-dir", tmp_path / "run"]
    # At each start the fault comes back: 23 steps further on.
    done = run(*SUPERVISE, "--pause", "0.1", "--", *train, FAULT=json.dumps(fault))
    assert done.code == 0, done.text
    assert done.err.count("restart 1 of 10") == 1
    killed, other = (
        load_file(path / "checkpoints/step-00000040/model.safetensors") for path in (tmp_path / "run", whole)
    )
    torch.testing.assert_close(killed, other, rtol=0, atol=0)


@pytest.mark.parametrize("launcher", ["horovodrun-mpi", "horovodrun-gloo"])
def test_a_signal_saves_and_stops_for_good(start, tmp_path, launcher):
    launch = [word.format(n=2) for word in LAUNCHERS[launcher]]
    train = [*launch, sys.executable, "-m", "hvdtrain", "train", RECIPE, "--run-dir", tmp_path / "run"]
    process = start(*SUPERVISE, "--", *train, "--train.steps", 100_000, "--pause", 0.01)
    log = tmp_path / "run" / "metrics.jsonl"
    wait_for(lambda: log.exists() and '"step": 4' in log.read_text())
    os.kill(process.pid, signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    assert process.returncode in (75, 1 if launcher == "horovodrun-gloo" else 75), out
    assert "on request (SIGTERM, rank" in out
    assert out.count("hvdtrain 0.") == 1  # not started again
    assert not processes_naming(tmp_path)


def test_a_supervisor_that_is_killed_leaves_no_run_behind(start, tmp_path):
    """Its ranks save and end, with all that stands between it and them: `hvdtrain -np`, which owns them too."""
    launch = [sys.executable, "-m", "hvdtrain", "-np", "2"]
    train = [*launch, "train", RECIPE, "--run-dir", tmp_path / "run", "--train.steps", 100_000, "--pause", 0.01]
    process = start(*SUPERVISE, "--", *train, "--checkpoint.every", 1_000_000)
    log = tmp_path / "run" / "metrics.jsonl"
    wait_for(lambda: log.exists() and '"step": 4' in log.read_text())
    process.kill()
    out, _ = process.communicate(timeout=120)  # to the end of the output: all have left
    assert "on request (the launcher is gone, rank" in out
    assert (tmp_path / "run" / "checkpoints" / "latest").exists()
    assert not processes_naming(tmp_path)


def test_a_signal_while_hosts_are_asked_is_not_forgotten(start, tmp_path):
    ssh = tmp_path / "ssh"
    ssh.write_text("#!/bin/sh\ntouch asked\nsleep 1\n")
    ssh.chmod(0o755)
    command = ["sh", "-c", "touch started; sleep 60", "-H", "elsewhere:1", "--run-dir", "run"]
    process = start(*SUPERVISE, "--ssh", ssh, "--", *command)
    wait_for((tmp_path / "asked").exists)
    os.kill(process.pid, signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 75, out
    assert "stopped on request while hosts were asked" in out
    assert not (tmp_path / "started").exists()


def test_a_signal_before_there_are_ranks_is_passed_on_later(start, tmp_path):
    """The launcher ignores it; the rank that it starts afterwards is asked."""
    rank = "import signal, time; signal.signal(15, lambda *_: exit(75)); open('up', 'w'); time.sleep(60)"
    (tmp_path / "stand-in").mkdir()  # not here, where the supervisor's own `python -m hvdtrain...` would find it
    (tmp_path / "stand-in" / "hvdtrain.py").write_text(rank)
    launcher = f"trap '' USR1; touch begun; sleep 2; PYTHONPATH=stand-in {sys.executable} -m hvdtrain"
    process = start(*SUPERVISE, "--", "sh", "-c", launcher, "--run-dir", "run")
    wait_for((tmp_path / "begun").exists)
    os.kill(process.pid, signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 75, out


def test_a_launcher_that_outlives_its_ranks_is_ended(run, tmp_path):
    launcher = f"OMPI_COMM_WORLD_RANK=0 {sys.executable} -c 'import time; time.sleep(1.5)'; exec sleep 1000"
    started = time.monotonic()
    command = ["sh", "-c", launcher, "--run-dir", "run"]
    done = run(*SUPERVISE, "--patience", "2", "--max-restarts", "0", "--", *command)
    assert done.code == 1, done.text
    assert "have been gone for 2 s and the launcher is still there" in done.err
    assert time.monotonic() - started < 60


def test_odd_bytes_in_latest_end_nothing(run, tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "latest").write_bytes(b"\xff\xfe\0")
    done = run(*SUPERVISE, "--pause", "0.01", "--max-restarts", "1", "--", "false", "--run-dir", "run")
    assert done.code == 1
    assert "giving up" in done.err
    assert "Traceback" not in done.err
