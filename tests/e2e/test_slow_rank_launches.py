"""A slow rank and slow data, planted in one launch, are each named once, with factor, host and cause."""

import re
import socket

RECIPE = """
import time
from dataclasses import dataclass

import torch

import hvdtrain
from hvdtrain.process.launch import detect_launch

RANK, QUICK, SLOW = detect_launch().rank, 0.01, 0.08


class Samples(hvdtrain.TensorSamples):
    def batch(self, indices):
        time.sleep(SLOW if RANK == 1 else 0.0)
        return super().batch(indices)


def loss(model, batch):
    time.sleep(SLOW if RANK == 2 else QUICK)
    return {"loss": (model(batch[0]) - batch[1]).square().sum()}


@dataclass(frozen=True, kw_only=True)
class Paced(hvdtrain.Recipe):
    def build(self, say):
        torch.manual_seed(0)
        x = torch.randn(64, 4)
        data = Samples(x, x.sum(1, keepdim=True))
        return hvdtrain.Task(model=torch.nn.Linear(4, 1), train_data=data, val_data=data, loss_sums=loss)


def recipe():
    return Paced(train=hvdtrain.TrainConfig(steps=180, global_batch_size=16), log=hvdtrain.LogConfig(every=5))
"""


def test_a_slow_rank_and_slow_data_are_named(hvdtrain, tmp_path):
    (tmp_path / "paced.py").write_text(RECIPE)
    done = hvdtrain("train", "paced.py", "--run-dir", "run", launcher="mpirun", ranks=4, timeout=240)
    assert done.code == 0, done.text
    warned = [line for line in done.text.splitlines() if "is slow, and all others wait" in line]
    assert len(warned) == 2, done.text
    by_rank = {int(re.search(r"rank (\d) on", line)[1]): line for line in warned}
    assert sorted(by_rank) == [1, 2]
    assert all(f"on {socket.gethostname()} is slow" in line for line in warned)
    assert all(float(re.search(r"([\d.]+) times the others'", line)[1]) > 1.3 for line in warned)
    assert "it waits for data" in by_rank[1]
    assert "sleeps for the rest" in by_rank[2]
