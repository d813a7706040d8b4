"""Hosts come and go under a supervised run: it goes on with what is left, and no sample is lost."""

import os
import signal
import sys
import time

import pytest
import torch
from conftest import processes_naming, run_to_end
from elastic_runs import RECIPE, compare_samples, steps_in
from safetensors.torch import load_file

pytestmark = pytest.mark.beside

SUPERVISE = [sys.executable, "-m", "hvdtrain", "supervise"]
STEPS = 60
LAST = f"run/checkpoints/step-{STEPS:08d}/model.safetensors"


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The samples of each step, and the weights, of a run on one rank that nothing happens to."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "seen").mkdir()
    command = [sys.executable, "-m", "hvdtrain", "train", RECIPE, "--run-dir", "run", "--train.steps", STEPS]
    done = run_to_end(*command, cwd=folder, timeout=240, SEEN=str(folder / "seen"))
    assert done.code == 0, done.text
    (file,) = (folder / "seen").iterdir()
    lines = [line.split() for line in file.read_text().splitlines()]
    return {int(step): [*map(int, samples)] for step, _, *samples in lines}, load_file(folder / LAST)


def until(condition, process, seconds=240):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def listed(tmp_path):
    """Hosts that are all this one."""

    def listed(*names):
        new = tmp_path / "hosts.new"
        new.write_text("".join(f"{name}:1\n" for name in names))
        new.replace(tmp_path / "hosts")

    listed("a")
    return listed


HERE = ["--hosts-file", "hosts", "--ssh", "true", "--look-every", "0.2", "--pause", "0.1"]


def test_it_grows_on_request_and_shrinks_when_a_host_is_to_leave(start, listed, alone, tmp_path):
    """Both times the run saves before it stops: no step is taken twice."""
    (tmp_path / "seen").mkdir()
    launch = ["mpirun", "--oversubscribe", "--bind-to", "none", "-np", "{ranks}"]
    train = [sys.executable, "-m", "hvdtrain", "train", RECIPE, "--run-dir", "run", "--train.steps", STEPS]
    process = start(
        *SUPERVISE, *HERE, "--grow", "request", "--", *launch, *train, "--pause", "0.1", SEEN=str(tmp_path / "seen")
    )

    def reached(step):
        files = [path.read_text() for path in (tmp_path / "seen").iterdir()]
        return any(f"\n{step} " in text for text in files)

    until(lambda: reached(5), process)
    listed("a", "b")
    time.sleep(1)
    os.kill(process.pid, signal.SIGUSR2)
    until(lambda: len([*(tmp_path / "seen").iterdir()]) == 3, process)
    before = max(
        int(text.split()[0]) for path in (tmp_path / "seen").iterdir() for text in path.read_text().splitlines()
    )
    until(lambda: reached(before + 2), process)
    listed("a")
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0, out
    assert "supervise: it grows from 1 to 2 ranks: it is asked to save and stop" in out
    assert "supervise: b is not listed any more, and still answers: it is asked to save and stop" in out
    assert compare_samples(steps_in(tmp_path / "seen"), alone[0]) == 0
    torch.testing.assert_close(load_file(tmp_path / LAST), alone[1], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("code", [0, 2])
def test_a_run_that_has_finished_or_is_wrong_is_not_started_again(run, listed, tmp_path, code):
    command = ["sh", "-c", f"echo {{ranks}} {{hosts}} >> started; exit {code}", "--run-dir", "run"]
    assert run(*SUPERVISE, *HERE, "--", *command).code == code
    assert (tmp_path / "started").read_text() == "1 a:1\n"


def test_a_launcher_that_returns_0_too_early_is_not_believed(run, listed, tmp_path):
    """Open MPI 5's mpirun does that when it has lost a host: the run's metrics know better."""
    (tmp_path / "run").mkdir()
    body = """echo '{"step": 1}' >> run/metrics.jsonl; echo x >> started
    [ $(wc -l < started) = 1 ] || echo '{"step": 2, "event": "finished"}' >> run/metrics.jsonl; true {ranks}"""
    done = run(*SUPERVISE, *HERE, "--", "sh", "-c", body, "--run-dir", "run")
    assert done.code == 0, done.text
    assert done.err.count("returned 0, but the run has not finished") == 1
    assert (tmp_path / "started").read_text() == "x\nx\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("stage", ["a script that hangs", "too few", "a launcher without ranks"])
def test_a_signal_ends_it_at_every_stage(start, listed, tmp_path, stage, number):
    launcher = ["sh", "-c", "touch begun; trap 'exit 75' USR1; while :; do sleep 0.1; done", "{ranks}"]
    where = HERE
    if stage == "a script that hangs":
        where = ["--hosts-script", "sh -c 'touch begun; sleep 600'", "--ssh", "true"]
    elif stage == "too few":
        where = ["--hosts-script", "sh -c 'echo a:1; touch begun'", "--ssh", "true", "--min-ranks", "2"]
    process = start(*SUPERVISE, *where, "--", *launcher, "--run-dir", "run")
    until((tmp_path / "begun").exists, process)
    time.sleep(1.0)
    os.kill(process.pid, number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 75, out
    assert "Traceback" not in out
    assert not processes_naming(tmp_path)


def test_a_launcher_whose_supervisor_is_killed_is_asked_to_stop(start, listed, tmp_path):
    """It has no rank on this host that could notice; a process that outlives the supervisor does."""
    launcher = "touch begun; trap 'touch asked; exit 75' USR1; while :; do sleep 0.1; done"
    process = start(*SUPERVISE, *HERE, "--", "sh", "-c", launcher, "{ranks}", "--run-dir", "run")
    until((tmp_path / "begun").exists, process)
    process.kill()
    process.communicate(timeout=60)  # to the end of the output: the launcher has left
    assert (tmp_path / "asked").exists()
