"""A supervised run whose hosts are listed: when it ends, and what it leaves. benchmarks/elastic.py loses hosts."""

import os
import signal
import sys
import time

import pytest
from conftest import processes_naming

pytestmark = pytest.mark.beside

SUPERVISE = [sys.executable, "-m", "hvdtrain", "supervise"]


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
@pytest.mark.parametrize("stage", ["a script that hangs", "too few", "a launcher without ranks", "a pause"])
def test_a_signal_ends_it_at_every_stage(start, listed, tmp_path, stage, number):
    launcher = ["sh", "-c", "trap 'exit 75' USR1; touch begun; while :; do sleep 0.1; done", "{ranks}"]
    where = HERE
    if stage == "a script that hangs":
        where = ["--hosts-script", "sh -c 'touch begun; sleep 600'", "--ssh", "true"]
    elif stage == "too few":
        where = ["--hosts-script", "sh -c 'echo a:1; touch begun'", "--ssh", "true", "--min-ranks", "2"]
    elif stage == "a pause":
        launcher, where = ["sh", "-c", "touch begun; exit 1", "{ranks}"], [*HERE, "--pause", "300"]
    process = start(*SUPERVISE, *where, "--", *launcher, "--run-dir", "run")
    until((tmp_path / "begun").exists, process)
    time.sleep(1.0)
    os.kill(process.pid, number)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 75, out
    assert "Traceback" not in out
    assert not processes_naming(tmp_path)


def test_a_launcher_whose_supervisor_is_killed_is_asked_to_stop(start, listed, tmp_path):
    """It has no rank on this host that could notice; a process that outlives the supervisor does."""
    launcher = "trap 'touch asked; exit 75' USR1; touch begun; while :; do sleep 0.1; done"
    process = start(*SUPERVISE, *HERE, "--", "sh", "-c", launcher, "{ranks}", "--run-dir", "run")
    until((tmp_path / "begun").exists, process)
    process.kill()
    process.communicate(timeout=120)  # to the end of the output: the launcher has left
    assert (tmp_path / "asked").exists()
