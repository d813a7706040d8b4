"""What a rank of Horovod's own elastic driver does in the comparison of elastic.py: its documented loop, and notes.

Each rank writes the samples of each step to a file of its own in `SEEN`, as tests/support/elastic_recipe.py does.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path

import horovod.torch as hvd
import torch
from torch.utils.data import DataLoader, TensorDataset

NUM_SAMPLES, BATCH = 960, 8


def main() -> None:
    """Train for some epochs; commit every so many batches."""
    epochs, every, pause = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    hvd.init()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(NUM_SAMPLES, 8, generator=generator)
    data = TensorDataset(x, x.sin().sum(1, keepdim=True), torch.arange(NUM_SAMPLES))
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))
    optimizer = hvd.DistributedOptimizer(
        torch.optim.AdamW(model.parameters(), lr=0.01), named_parameters=model.named_parameters()
    )
    sampler = hvd.elastic.ElasticSampler(data, shuffle=True)
    loader = DataLoader(data, batch_size=BATCH, sampler=sampler)
    file = Path(os.environ["SEEN"], f"{socket.gethostname()}-{os.getpid()}")

    @hvd.elastic.run
    def train(state: hvd.elastic.TorchState) -> None:
        for state.epoch in range(state.epoch, epochs):
            state.sampler.set_epoch(state.epoch)
            for number, (inputs, targets, samples) in enumerate(loader):
                time.sleep(pause)
                optimizer.zero_grad()
                torch.nn.functional.mse_loss(model(inputs), targets).backward()
                optimizer.step()
                with file.open("a") as lines:
                    lines.write(f"{state.epoch} {time.time():.3f} {hvd.size()} {' '.join(map(str, samples.tolist()))}\n")
                state.sampler.record_batch(number, BATCH)
                if number % every == 0:
                    state.commit()

    train(hvd.elastic.TorchState(model=model, optimizer=optimizer, sampler=sampler, epoch=0))


if __name__ == "__main__":
    main()
