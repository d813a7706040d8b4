"""A run that is asked to stop saves, exits with 75, and goes on as if nothing had happened."""

import json
import os
import signal
import sys

import pytest
import torch
from conftest import LAUNCHERS
from patience import wait_for, whole_lines
from safetensors.torch import load_file

pytestmark = pytest.mark.alone

CONSTANT = ["--optim.schedule", "constant"]  # the number of steps must not change the learning rate


APART = "--comm.sync local --comm.period 8 --comm.fragments 2 --comm.overlap-steps 3 --comm.outer nesterov"
APART = [*APART.split(), "--comm.compression", "int8"]  # steps between which updates are on their way


def lines_of(run_dir):
    return whole_lines(run_dir / "metrics.jsonl")


def launch(start, tiny_lm, run_dir, launcher, *more):
    begin = [word.format(n=2) for word in LAUNCHERS[launcher]] if launcher else []
    command = [*begin, sys.executable, "-m", "hvdtrain", *tiny_lm, *CONSTANT, "--run-dir", run_dir, *more]
    return start(*command)


@pytest.mark.parametrize(
    ("launcher", "target", "number", "more"),
    [
        (None, "launcher", signal.SIGINT, []),
        ("mpirun", "launcher", signal.SIGUSR1, APART),
        ("horovodrun-gloo", 1, signal.SIGTERM, []),
        ("horovodrun-gloo", "launcher", signal.SIGTERM, []),
    ],
)
def test_a_signal_stops_all_ranks_and_the_run_goes_on(
    start, hvdtrain, tiny_lm, tmp_path, launcher, target, number, more
):
    run_dir = tmp_path / "run"
    process = launch(start, tiny_lm, run_dir, launcher, "--train.steps", 100_000, *more)
    wait_for(lambda: len(lines_of(run_dir)) >= 2)
    ranks = json.loads((run_dir / "environment.json").read_text())["ranks"]
    os.kill(process.pid if target == "launcher" else ranks[target]["pid"], number)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 75, out
    assert "Traceback" not in out
    assert out.count("on request") == 1
    assert number.name in out
    checkpoint = (run_dir / "checkpoints" / "latest").read_text().strip()
    stopped_at = int(checkpoint.removeprefix("step-"))
    assert f"stopped at step {stopped_at} of 100000" in out
    if launcher is None or more:
        compare_with_uninterrupted(hvdtrain, [*tiny_lm, *more], tmp_path, launcher, stopped_at + 13)


def compare_with_uninterrupted(hvdtrain, tiny_lm, tmp_path, launcher, steps):
    weights = []
    for name in ("run", "whole"):
        arguments = [*tiny_lm, *CONSTANT, "--train.steps", steps, "--run-dir", tmp_path / name]
        done = hvdtrain(*arguments, launcher=launcher, ranks=2 if launcher else 1)
        assert done.code == 0, done.text
        weights.append(load_file(tmp_path / name / "checkpoints" / f"step-{steps:08d}" / "model.safetensors"))
    torch.testing.assert_close(*weights, rtol=0, atol=0)
    steps_seen = [[line["step"] for line in lines_of(tmp_path / name)] for name in ("run", "whole")]
    assert steps_seen[0] == steps_seen[1]


def test_a_time_budget_stops_without_a_signal(hvdtrain, tiny_lm, tmp_path):
    arguments = [*tiny_lm, "--train.steps", 100_000, "--train.max-time", "2s", "--run-dir", tmp_path / "run"]
    done = hvdtrain(*arguments, launcher="mpirun", ranks=2)
    assert done.code == 75, done.text
    assert "--train.max-time is used up" in done.err


def test_a_second_run_on_the_same_directory_is_refused(start, hvdtrain, tiny_lm, tmp_path):
    run_dir = tmp_path / "run"
    process = launch(start, tiny_lm, run_dir, None, "--train.steps", 100_000)
    wait_for(lambda: len(lines_of(run_dir)) >= 1)
    arguments = [*tiny_lm, *CONSTANT, "--train.steps", 100_000, "--run-dir", run_dir]
    done = hvdtrain(*arguments, launcher="mpirun", ranks=2)
    assert done.code == 2, done.text
    assert f"another run is training in {run_dir} (process {process.pid} on" in done.err
    process.kill()  # a dead holder keeps no lock
    process.wait(timeout=120)
    assert hvdtrain(*arguments, "--train.max-time", "1s").code == 75


LAUNCHES = """
import sys, threading, time
from pathlib import Path
from horovod.runner.common.util import safe_shell_exec

RANK = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); open('ready', 'w');"
RANK += " time.sleep(60)"

def ask(event):
    while not Path("ready").exists():
        time.sleep(0.01)
    event.set()

if __name__ == "__main__":
    event = threading.Event()
    threading.Thread(target=ask, args=(event,), daemon=True).start()
    shell = f"{sys.executable} -c \\"{RANK}\\"; code=$?; sleep 0.3; exit $code"
    sys.exit(safe_shell_exec.execute(shell, events=[event]))
"""


def test_a_rank_that_ends_on_a_signal_has_its_exit_code_from_horovodrun_though_its_shell_is_slow(start, tmp_path):
    (tmp_path / "launches.py").write_text(LAUNCHES)
    process = start(sys.executable, tmp_path / "launches.py")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 75, out
