"""Two ranks on GPUs, over NCCL: with a GPU each, or, where there is one, on the same one (sharing_a_gpu.py)."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here"),
    pytest.mark.skipif(importlib.util.find_spec("horovod") is None, reason="there is no Horovod here"),
]
HERE = Path(__file__).parent
SHARING = [str(HERE / "sharing_a_gpu.py")] if torch.cuda.device_count() < 2 else []
LAUNCHERS = {"mpi": ["horovodrun", "-np", "2"], "gloo": ["horovodrun", "--gloo", "-np", "2"]}


def start(*words, launcher="mpi", **options):
    command = [*LAUNCHERS[launcher], sys.executable, *SHARING, *map(str, words)]
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )


def run(*words, launcher="mpi", expected=0, timeout=240):
    process = start(*words, launcher=launcher, start_new_session=True)
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"hangs:\n{output[-3000:]}")
    assert process.returncode == expected, output[-5000:]
    return output


def said(output, key):
    line = next(line for line in output.splitlines() if f'"{key}"' in line)
    return json.loads(line[line.index("{") :])


@pytest.mark.parametrize("launcher", list(LAUNCHERS))
def test_everything_that_a_world_does(launcher):
    answer = said(run(HERE / "nccl_ranks.py", launcher=launcher), "wrong")
    assert not answer["wrong"], "\n\n".join(f"{name}:\n{text}" for name, text in answer["wrong"].items())
    assert (answer["device"], answer["ranks"]) == ("cuda", 2)


@pytest.mark.parametrize("way", ["whole", "shard"])
def test_a_step_of_two_ranks_waits_for_no_gpu(way):
    answer = said(run(HERE / "rank_that_does_not_wait.py", way), "is_busy")
    assert answer == {"is_busy": True, "is_right": True}


SLOW_START = """
import horovod.torch as hvd, torch
hvd.init()
hvd.allreduce(torch.ones(1, device="cuda"), name="first")
"""


def test_a_start_of_nccl_that_takes_too_long_ends_with_what_to_set(tmp_path, monkeypatch):
    """By the engine's own limit, which is for each communicator; no start takes less than a millisecond."""
    monkeypatch.setenv("HOROVOD_NCCL_START_LIMIT", "0.001")
    (tmp_path / "slow_start.py").write_text(SLOW_START)
    output = run(tmp_path / "slow_start.py", expected=1, timeout=100)
    assert "NCCL has not started within 0.001 s on rank" in output
    assert "NCCL_SOCKET_IFNAME" in output


@pytest.mark.parametrize(
    "settings",
    [
        ["--optim.shard"],
        ["--optim.offload", "cpu"],
        ["--comm.sync", "local", "--comm.period", 5],
        ["--comm.compression", "powersgd:4"],
        ["--profile.timeline", "20:22"],
    ],
    ids=["shard", "offload", "local", "powersgd", "timeline"],
)
def test_ways_of_two_ranks_learn(tmp_path, settings):
    words = ["-m", "hvdtrain", "train", "lm", "--train.steps", 60, "--log.every", 10, *settings]
    run(*words, "--run-dir", tmp_path / "run", timeout=120)
    found = losses(tmp_path / "run")
    assert found[-1] < 0.8 * found[0]


def losses(directory):
    lines = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return [line["train/loss"] for line in lines if "train/loss" in line]


def test_two_ranks_learn_what_one_does(tmp_path):
    words = ["-m", "hvdtrain", "train", "lm", "--train.steps", 40, "--log.every", 1]
    run(*words, "--run-dir", tmp_path / "two")
    alone = [sys.executable, *map(str, words), "--run-dir", str(tmp_path / "one")]
    done = subprocess.run(alone, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == len(two) == 40
    assert two[:10] == pytest.approx(one[:10], rel=1e-4)
    assert two[-1] == pytest.approx(one[-1], rel=2e-2)


def test_verify_passes():
    assert "all checks passed" in run("-m", "hvdtrain", "verify", "lm", timeout=400)


def wait_for_steps(directory, count):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        file = directory / "metrics.jsonl"
        if file.exists() and len(file.read_text().splitlines()) >= count:
            return
        time.sleep(0.1)
    pytest.fail("no steps were taken")


def ranks_below(pid):
    """Return the processes of ranks that a launcher has started."""
    found, parents = [], {pid}
    table = subprocess.run(["ps", "-eww", "-o", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in table.splitlines()[1:]]
    for _ in range(10):
        parents |= {int(row[0]) for row in rows if int(row[1]) in parents}
    for row in rows:
        if int(row[0]) in parents and "hvdtrain train" in row[2] and row[2].startswith(sys.executable):
            found.append(int(row[0]))
    return found


@pytest.mark.parametrize(("what", "code"), [(signal.SIGTERM, 75), (signal.SIGKILL, None)])
def test_a_rank_that_is_ended(tmp_path, what, code):
    """Asked to stop, all ranks save and end with 75; a killed one ends the job soon, with an error."""
    words = ["-m", "hvdtrain", "train", "lm", "--train.steps", 100_000, "--log.every", 5, "--run-dir", tmp_path / "run"]
    process = start(*words, start_new_session=True)
    try:
        wait_for_steps(tmp_path / "run", 4)
        ranks = ranks_below(process.pid)
        assert len(ranks) == 2
        os.kill(ranks[1], what)
        output, _ = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            print(process.communicate()[0][-3000:])
    assert process.returncode == code if code else process.returncode not in (0, 2, 75), output[-3000:]
    if code:
        assert (tmp_path / "run" / "latest").exists() or list((tmp_path / "run").rglob("*.safetensors")), output[-3000:]


def test_two_ranks_share_a_save_and_go_on_from_it(tmp_path):
    """The optimizer's state is more than one rank writes alone: both copy and write it, and it is sent once."""
    shape = ["--model.hidden-size", 512, "--model.num-heads", 8, "--model.num-layers", 6]
    words = ["-m", "hvdtrain", "train", "lm", *shape, "--checkpoint.every", 10, "--log.every", 1, "--train.steps"]
    run(*words, 20, "--run-dir", tmp_path / "whole")
    run(*words, 20, "--run-dir", tmp_path / "parts")
    newest = tmp_path / "parts" / "checkpoints" / (tmp_path / "parts" / "checkpoints" / "latest").read_text().strip()
    assert (newest / "state-rank-001.pt").exists()
    shutil.rmtree(newest)
    run(*words, 20, "--run-dir", tmp_path / "parts")
    assert losses(tmp_path / "parts")[-1] == pytest.approx(losses(tmp_path / "whole")[-1], rel=1e-3)
