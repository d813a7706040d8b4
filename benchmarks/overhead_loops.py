"""One process of the loops that overhead.py holds hvdtrain against: each the shortest that is correct.

overhead.py starts it with a runner, a number of steps, the file for its times and, for the script, the folder of MNIST.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from overhead_recipe import BATCH, LR, WINDOW, samples
from torch import Tensor, nn

from hvdtrain.models.mlp import Mlp


def tensors(rank: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of this rank's part of each shuffled epoch, without end."""
    x, y = samples()
    epoch = 0
    while True:
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch))
        for start in range(0, len(x), BATCH * size):
            mine = order[start + rank * BATCH : start + (rank + 1) * BATCH]
            yield x.index_select(0, mine), y.index_select(0, mine)
        epoch += 1


def images(root: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of a textbook: torchvision's data set, transformed image by image, through a DataLoader."""
    from torchvision import datasets, transforms

    as_textbooks = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))])
    data = datasets.MNIST(root, train=True, transform=as_textbooks)
    while True:
        yield from torch.utils.data.DataLoader(data, batch_size=BATCH, shuffle=True)


def timed(steps: int, step: Callable[[], None]) -> list[float]:
    """Take the steps; returns the mean seconds of each window of them."""
    windows = []
    for _ in range(steps // WINDOW):
        started = time.perf_counter()
        for _ in range(WINDOW):
            step()
        windows.append((time.perf_counter() - started) / WINDOW)
    return windows


def loop(runner: str, steps: int, root: str) -> tuple[int, list[float]]:
    """Train by one of the loops; returns the rank and its windows."""
    model: nn.Module = Mlp()
    rank, size = 0, 1
    if runner.startswith(("horovod", "stock")):
        import horovod.torch as hvd

        hvd.init()
        rank, size = hvd.rank(), hvd.size()
    elif runner == "ddp":
        torch.distributed.init_process_group("gloo")
        rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    if runner.startswith(("horovod", "stock")):
        optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    batches = images(root) if runner == "script" else tensors(rank, size)

    def step() -> None:
        x, y = next(batches)
        optimizer.zero_grad()
        F.nll_loss(model(x), y).backward()
        optimizer.step()

    return rank, timed(steps, step)


if __name__ == "__main__":
    rank, windows = loop(sys.argv[1], int(sys.argv[2]), sys.argv[4])
    if rank == 0:
        Path(sys.argv[3]).write_text(json.dumps(windows))
