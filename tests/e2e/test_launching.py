"""Ranks that a program, a notebook or `hvdtrain -np N` starts."""

import contextlib
import dataclasses
import errno
import multiprocessing.context
import os
import signal
import sys
import tempfile
import threading
import time

import pytest
from conftest import environment
from patience import catches, wait_for

import hvdtrain
from hvdtrain.errors import ConfigError, LaunchError
from hvdtrain.process.job import command_of, count_of_ranks, run_job


@contextlib.contextmanager
def outside(monkeypatch):
    """Be a process that no launcher has started."""
    for name in list(os.environ):
        if name.startswith(("OMPI_COMM", "PMIX", "PMI_", "HOROVOD_RANK")) or name == "OMP_NUM_THREADS":
            monkeypatch.delenv(name)
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    yield


def test_a_function_on_one_rank_needs_no_launcher(monkeypatch, capsys):
    factor = 3

    def work(number, *, more):
        print("at work")
        return factor * number + more

    with outside(monkeypatch):
        assert hvdtrain.launch(work, 2, ranks=1, more=1) == [7]
        assert "at work" in capsys.readouterr().out
        with pytest.raises(LaunchError, match=r"(?s)rank 0 of 1 has failed:.*in work.*TypeError"):
            hvdtrain.launch(work, None, ranks=1, more=1)
        with pytest.raises(TimeoutError, match="had not ended after 1 s"):
            hvdtrain.launch(time.sleep, 60, ranks=1, timeout_s=1)
        with pytest.raises(LaunchError, match="exit code 7"):
            hvdtrain.launch(os._exit, 7, ranks=1)
        with pytest.raises(ConfigError, match="cannot be sent"):
            hvdtrain.launch(print, sys.stdout, ranks=1)
        with pytest.raises(ConfigError, match="calls a function on every rank, not an object of type int"):
            hvdtrain.launch(3, ranks=1)


def test_what_a_function_may_return(monkeypatch):
    """Also objects of classes of the program itself, as of a notebook: they are of these classes here, too."""

    @dataclasses.dataclass
    class Found:
        loss: float

    monkeypatch.setattr(Found, "__module__", "__main__")
    with outside(monkeypatch):
        (found,) = hvdtrain.launch(lambda: Found(0.5), ranks=1)
        assert isinstance(found, Found)
        assert found.loss == 0.5
        (function,) = hvdtrain.launch(lambda: lambda: 3, ranks=1)
        assert function() == 3
        with pytest.raises(LaunchError, match=r"of type lock, cannot be sent back .*: return numbers, texts, tensors"):
            hvdtrain.launch(threading.Lock, ranks=1)


def test_a_launch_shares_no_folder_with_an_earlier_one(monkeypatch, tmp_path):
    """A killed mpirun leaves a folder named by its number, and one of the same number would not start."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    program = "import os, pathlib, sys; print(sorted(f.name for f in pathlib.Path(sys.argv[1]).glob('*/ompi.*')))"
    lines = []
    with outside(monkeypatch):
        assert run_job(2, [sys.executable, "-c", program, str(tmp_path)], lines.append, timeout_s=60) == 0
        assert sum("'ompi." in line for line in lines) == 2, lines
        assert not list(tmp_path.iterdir())
        lines.clear()
        monkeypatch.setenv("PRTE_MCA_prte_local_tmpdir_base", str(tmp_path / "own"))  # what the user chose stays
        show = "import os; print(os.environ['PRTE_MCA_prte_local_tmpdir_base'])"
        assert run_job(1, [sys.executable, "-c", show], lines.append, timeout_s=60) == 0
        assert "".join(lines).strip() == str(tmp_path / "own")


def test_one_rank_gets_signals_too(start):
    """No launcher has started it, and nothing in its environment tells that it is a rank."""
    rank = (
        "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(75)); print('up', flush=True); time.sleep(60)"
    )
    job = (
        f"import sys; from hvdtrain.process.job import run_job; sys.exit(run_job(1, [sys.executable, '-c', {rank!r}]))"
    )
    process = start(sys.executable, "-c", job)
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 75


def test_a_signal_before_there_are_ranks_is_passed_on_later(start):
    """Ctrl-C while the launcher starts: it was forgotten, and a second one lost what was trained."""
    rank = "import signal, time; signal.signal(15, lambda *_: exit(75)); print('up', flush=True); time.sleep(60)"
    launcher = ["sh", "-c", 'sleep 2; OMPI_COMM_WORLD_RANK=0 exec "$@"', "launcher"]
    job = (
        "import sys; from hvdtrain.process.job import run_job; print('job', flush=True);"
        f"sys.exit(run_job(2, [sys.executable, '-c', {rank!r}], starter={launcher!r}))"
    )
    process = start(sys.executable, "-c", job)
    assert process.stdout.readline() == "job\n"
    wait_for(lambda: catches(process.pid, signal.SIGTERM))  # the launcher has just been started
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 75


@pytest.mark.parametrize("ranks", [0, -1, 2.0, True, "2", None, 10**6])
def test_numbers_of_ranks_that_are_none(ranks):
    with pytest.raises(ConfigError, match="must be a whole number"):
        hvdtrain.launch(print, ranks=ranks)


@pytest.mark.parametrize("text", ["", "0", "-1", "x", "2.0", "99999999999999", "٣"])
def test_counts_that_are_none(text):
    with pytest.raises(ConfigError, match="give the number of ranks"):
        count_of_ranks(text)
    assert count_of_ranks("4") == 4


def test_a_rank_starts_no_ranks(monkeypatch):
    monkeypatch.setenv("HOROVOD_RANK", "1")
    monkeypatch.setenv("HOROVOD_SIZE", "2")
    with pytest.raises(LaunchError, match="this is rank 1 of 2"):
        command_of(2, ["true"])


def test_a_function_on_two_ranks(monkeypatch):
    def work():
        import torch

        world = hvdtrain.init()
        return world.rank, world.size, world.all_reduce(torch.tensor(float(world.rank)), "sum").item()

    def fails():
        if hvdtrain.init().rank == 1:
            raise ValueError("no luck")
        time.sleep(60)

    with outside(monkeypatch):
        assert hvdtrain.launch(work, ranks=2, timeout_s=100) == [(0, 2, 1.0), (1, 2, 1.0)]
        with pytest.raises(LaunchError, match=r"(?s)rank 1 of 2 has failed:.*ValueError: no luck"):
            hvdtrain.launch(fails, ranks=2, timeout_s=100)


def test_the_command_line_starts_its_own_ranks_and_passes_a_signal_on(start, tiny_lm, tmp_path):
    command = [sys.executable, "-m", "hvdtrain", "-np", "2", *tiny_lm, "--train.steps", "100000", "--run-dir", "run"]
    process = start(*command)

    def has_saved():
        assert process.poll() is None, process.stdout.read()
        return (tmp_path / "run" / "checkpoints" / "latest").exists()

    wait_for(has_saved)
    os.kill(process.pid, signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 75, out
    assert "2 ranks" in out
    assert "stopped" in out


def test_what_follows_np(run):
    done = run(sys.executable, "-m", "hvdtrain", "-np", "many", "train", "lm")
    assert (done.code, done.out) == (2, "")
    assert done.err == "hvdtrain: -np many: give the number of ranks, from 1 to 4096, as in -np 4\n"
    done = run(sys.executable, "-m", "hvdtrain", "-np", "1", "train", "lm", "--optim.peak-lr", "x")
    assert done.code == 2
    assert "Traceback" not in done.err


def test_whatever_a_rank_prints_it_is_not_held_up(monkeypatch, capsys):
    """Bytes that are no text, and an output that is full: a pipe that nobody reads would fill, and hold the rank."""

    def odd():
        os.write(1, b"\xff\xfe\n" * 100_000)
        return 1

    def full(line):
        raise OSError(errno.ENOSPC, "No space left on device")

    with outside(monkeypatch):
        assert hvdtrain.launch(odd, ranks=1, timeout_s=60) == [1]
        assert capsys.readouterr().out.count("\N{REPLACEMENT CHARACTER}") == 200_000
        program = [sys.executable, "-c", "print('x' * 300_000)"]
        assert run_job(1, program, full, timeout_s=60) == 0


def test_a_process_that_keeps_a_ranks_output_open_keeps_nobody(monkeypatch):
    """As what a tracker of the user's starts; it is ended with the job."""
    code = "import subprocess; subprocess.Popen(['sleep', '300']); print('done')"
    lines = []
    started = time.monotonic()
    with outside(monkeypatch):
        assert run_job(1, [sys.executable, "-c", code], lines.append) == 0
    assert lines == ["done\n"]
    assert time.monotonic() - started < 60


def test_without_semaphores_it_is_said_before_horovodrun_fails(monkeypatch):
    """A read-only /dev/shm, where `horovodrun` itself ends in a traceback."""

    def refuse(self):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(multiprocessing.context.SpawnContext, "Semaphore", refuse)
    with (
        outside(monkeypatch),
        pytest.raises(LaunchError, match=r"/dev/shm that can be written \(Read-only file system"),
    ):
        command_of(2, ["true"])
