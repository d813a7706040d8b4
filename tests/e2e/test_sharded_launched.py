"""A run with `--optim.shard` is killed, and goes on without it and with it, on one rank and on two."""

import json
import os
import signal
import sys

import torch
from conftest import LAUNCHERS
from patience import wait_for
from safetensors.torch import load_file


def test_a_sharded_run_is_killed_and_goes_on_at_other_sizes(start, hvdtrain, tiny_lm, tmp_path):
    """Two ranks until one is killed, then one without sharding, then two with it: the weights that one learns."""
    run_dir, latest = tmp_path / "run", tmp_path / "run" / "checkpoints" / "latest"
    own = ["--optim.schedule", "constant", "--checkpoint.every", "5", "--eval.every", "none"]
    begin = [word.format(n=2) for word in LAUNCHERS["mpirun"]]
    more = ["--run-dir", run_dir, "--train.steps", "100000", "--optim.shard"]
    process = start(*begin, sys.executable, "-m", "hvdtrain", *tiny_lm, *own, *more)
    wait_for(latest.exists)
    os.kill(json.loads((run_dir / "environment.json").read_text())["ranks"][1]["pid"], signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode not in (0, 75)
    killed_at = int(latest.read_text().strip().removeprefix("step-"))
    steps = killed_at + 4

    def train(folder, steps, *more, **launched):
        done = hvdtrain(*tiny_lm, *own, "--run-dir", folder, "--train.steps", steps, *more, **launched)
        assert done.code == 0, done.text
        return load_file(folder / "checkpoints" / f"step-{steps:08d}" / "model.safetensors")

    train(run_dir, killed_at + 2)
    sharded = train(run_dir, steps, "--optim.shard", launcher="mpirun", ranks=2)
    torch.testing.assert_close(sharded, train(tmp_path / "alone", steps), rtol=0, atol=1e-4)
