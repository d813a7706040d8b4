"""What needs a GPU: skipped elsewhere. One rank a GPU, as many ranks as there are GPUs, two at most."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here"),
]
RANKS = min(2, torch.cuda.device_count())
REPOSITORY = Path(__file__).parents[2]


def hvdtrain(*words, cwd, timeout=300):
    start = ["horovodrun", "-np", str(RANKS)] if RANKS > 1 else []
    command = [*start, sys.executable, "-m", "hvdtrain", *map(str, words)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    return done.stdout


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "bf16-true"])
def test_it_learns_in_every_precision(tmp_path, precision):
    train = ["train", "lm", "--train.steps", 200, "--train.precision", precision, "--eval.every", 100]
    out = hvdtrain(*train, "--run-dir", "run", cwd=tmp_path)
    assert "device:     cuda" in out or "NVIDIA" in out
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["val/bits_per_byte"] < 3.5  # of eight; the text is that of the Python at hand


def test_compiled_blocks(tmp_path):
    train = ["train", "lm", "--train.steps", 60, "--train.precision", "bf16", "--model.compile", "blocks"]
    hvdtrain(*train, "--run-dir", "run", cwd=tmp_path)


def test_verify(tmp_path):
    assert "all checks passed" in hvdtrain("verify", "lm", cwd=tmp_path)


def test_doctor_finds_nothing_wrong(tmp_path):
    assert "error " not in hvdtrain("doctor", cwd=tmp_path)


def test_horovod_has_nccl_where_there_are_several():
    if RANKS < 2:
        pytest.skip("one GPU needs no NCCL")
    done = subprocess.run(["horovodrun", "--check-build"], capture_output=True, text=True, timeout=60, check=True)
    assert "[X] NCCL" in done.stdout


def language_model(micro_batch_size=None):
    """Return the settled job of the default recipe on this GPU; of a larger model where a micro-batch is given."""
    import dataclasses

    from hvdtrain.process.launch import Launch
    from hvdtrain.recipes.lm import lm
    from hvdtrain.rundir.directory import RunDirectory
    from hvdtrain.rundir.log import MetricLog
    from hvdtrain.trainer import settle
    from hvdtrain.world import SoloWorld

    recipe = lm()
    if micro_batch_size:
        model = dataclasses.replace(recipe.model, num_layers=6, hidden_size=512, num_heads=8)
        train = dataclasses.replace(recipe.train, micro_batch_size=micro_batch_size, accum_steps=1)
        recipe = dataclasses.replace(recipe, model=model, train=dataclasses.replace(train, global_batch_size=None))
    world = SoloWorld(torch.device("cuda", 0), Launch("none"))
    return settle(recipe.build(lambda line: None), recipe, world, RunDirectory(Path("none")), MetricLog(None, []))


def test_a_step_does_not_wait_for_the_gpu():
    from hvdtrain.trainer import train_step
    from hvdtrain.trainer.state import start_training

    job = language_model()
    training = start_training(job)
    for _ in range(3):
        train_step(job, training)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            train_step(job, training)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_estimate_of_memory_is_near_the_peak():
    """Weights, gradients, optimizer and activations of a step, against torch's own count, cuBLAS's workspaces aside."""
    from hvdtrain.trainer import train_step
    from hvdtrain.trainer.memory import estimate
    from hvdtrain.trainer.state import start_training

    job = language_model(micro_batch_size=64)
    expected = estimate(job)
    square = torch.ones(64, 64, device="cuda", requires_grad=True)
    (square @ square).sum().backward()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    training = start_training(job)
    for _ in range(3):
        train_step(job, training)
    assert torch.cuda.max_memory_allocated() - before == pytest.approx(expected.total, rel=0.15)
