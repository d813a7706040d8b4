"""A small network whose ranks write down which samples each step has had: a run that changes its hosts loses none.

`SEEN` names a folder that gets a file of each rank of each start, named `START-RANK`; its lines are "step seconds
sample sample ...".
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import hvdtrain
from hvdtrain import CheckpointConfig, EvalConfig, LogConfig, OptimConfig, Recipe, Task, TensorSamples, TrainConfig

NUM_SAMPLES = 1000


class Written(hvdtrain.Callback):
    """Writes the samples of a step down once the step is taken: what was begun and lost is none of its samples."""

    def __init__(self):
        self.taken = []

    def begin(self, run):
        start = run.world.broadcast_object(time.time_ns(), "start")
        self.file = Path(os.environ["SEEN"], f"{start}-{run.world.rank:03d}")

    def after_step(self, run):
        with self.file.open("a") as file:
            file.write(f"{run.step} {time.time():.3f} {' '.join(map(str, self.taken))}\n")
        self.taken.clear()


@dataclass(frozen=True, kw_only=True)
class Small(Recipe):
    """A regression with dropout, in fp64."""

    pause: float = 0.0
    """Seconds that a step takes longer."""

    def build(self, say):
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(NUM_SAMPLES, 8, generator=generator, dtype=torch.float64)
        torch.manual_seed(self.train.seed)
        model = torch.nn.Sequential(
            torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Dropout(0.2), torch.nn.Linear(64, 1)
        ).double()
        written = Written()

        def loss(model, batch):
            inputs, targets, numbers = batch
            if model.training:
                written.taken += numbers.tolist()
                time.sleep(self.pause)
            return {"loss": (model(inputs) - targets).square().sum()}

        data = TensorSamples(x, x.sin().sum(1, keepdim=True), torch.arange(NUM_SAMPLES))
        callbacks = [written] if "SEEN" in os.environ else []
        return Task(model=model, train_data=data, val_data=data, loss_sums=loss, callbacks=callbacks)


def recipe():
    return Small(
        train=TrainConfig(steps=120, global_batch_size=24),
        optim=OptimConfig(peak_lr=0.01, schedule="constant"),
        log=LogConfig(every=5),
        eval=EvalConfig(every=1000),
        checkpoint=CheckpointConfig(every=10),
    )
