"""One rank of the loops that vision.py holds hvdtrain against; it starts this file with a description as JSON.

horovod: a DataLoader and `hvd.DistributedOptimizer`, as Horovod's ImageNet example goes about it. ddp: DDP over Gloo in
the manner of torchvision's reference for classification, which computes top-1 and top-5 in every step. input: a
DataLoader alone.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
import torchvision
from torch.utils.data import DataLoader, DistributedSampler
from torchvision.transforms import v2

WINDOW = 5  # steps whose mean is one measurement, as hvdtrain logs them
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def loader_of(given: SimpleNamespace, rank: int, size: int) -> DataLoader:
    """Return torchvision's images in batches, augmented as its references do."""
    steps = [v2.RandomResizedCrop(given.size, antialias=True), v2.RandomHorizontalFlip(), v2.PILToTensor()]
    steps += [v2.ToDtype(torch.float, scale=True), v2.Normalize(MEAN, STD), v2.ToPureTensor()]
    data = torchvision.datasets.ImageFolder(Path(given.root) / "train", v2.Compose(steps))
    sampler = DistributedSampler(data, size, rank, shuffle=True, drop_last=True)
    workers = {"num_workers": given.workers, "persistent_workers": True, "prefetch_factor": 2} if given.workers else {}
    if given.workers:
        workers["multiprocessing_context"] = "forkserver"  # fork is not safe beside MPI
    return DataLoader(data, given.batch, sampler=sampler, drop_last=True, **workers)


def endless(loader: DataLoader) -> Iterator[list[torch.Tensor]]:
    """Yield batches, epoch after epoch."""
    epoch = 0
    while True:
        loader.sampler.set_epoch(epoch)
        yield from loader
        epoch += 1


def input_alone(given: SimpleNamespace) -> list[float]:
    """Return images a second of each window, of the loader alone."""
    batches, rates = endless(loader_of(given, 0, 1)), []
    for _ in range(given.steps // WINDOW):
        started = time.perf_counter()
        for _ in range(WINDOW):
            next(batches)
        rates.append(WINDOW * given.batch / (time.perf_counter() - started))
    return rates


def train(given: SimpleNamespace) -> tuple[int, list[float]]:
    """Train by Horovod or DDP; returns the rank and the mean seconds of a step in each window."""
    if given.runner == "horovod":
        import horovod.torch as hvd

        hvd.init()
        rank, size = hvd.rank(), hvd.size()
    else:
        torch.distributed.init_process_group("gloo")
        rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.manual_seed(0)
    torch.set_num_threads(given.threads)
    batches = endless(loader_of(given, rank, size))
    model = torchvision.models.get_model(given.model, num_classes=given.classes)
    trained: torch.nn.Module = model if given.runner == "horovod" else torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    if given.runner == "horovod":
        optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    windows, started = [], time.perf_counter()
    for number in range(given.steps):
        images, labels = next(batches)
        loss = F.cross_entropy(out := trained(images), labels, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        is_right = out.detach().topk(5, 1).indices == labels.unsqueeze(1)
        _ = loss.item(), is_right[:, 0].float().mean().item(), is_right.any(1).float().mean().item()
        if (number + 1) % WINDOW == 0:
            windows.append((time.perf_counter() - started) / WINDOW)
            started = time.perf_counter()
    return rank, windows


if __name__ == "__main__":
    description = SimpleNamespace(**json.loads(sys.argv[1]))
    number, found = (0, input_alone(description)) if description.runner == "input" else train(description)
    if number == 0:
        Path(description.times).write_text(json.dumps(found))
