"""One rank of the training loops that speed.py holds hvdtrain against: each the shortest that is correct.

speed.py starts it, with a description of the comparison as JSON. On a GPU machine each rank takes the GPU of its local
rank, and collectives are NCCL's.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from hvdtrain.data.config import TextConfig
from hvdtrain.data.order import SampleOrder
from hvdtrain.data.text.stream import PreparedText, prepare_text
from hvdtrain.data.text.windows import TokenWindows
from hvdtrain.models.config import DecoderConfig
from hvdtrain.models.decoder import Decoder
from hvdtrain.models.loss import next_token_loss
from hvdtrain.settings import BatchPlan

WINDOW = 5  # steps whose mean is one measurement, as hvdtrain logs them


def local_device() -> torch.device:
    """Return this rank's device, made the current one."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", os.environ.get("OMPI_COMM_WORLD_LOCAL_RANK", 0))))
    torch.cuda.set_device(device)
    return device


def timed(steps: int, step: Callable[[int], None], device: torch.device) -> list[float]:
    """Take the steps; returns the mean seconds of each window of them."""
    windows, started = [], time.perf_counter()
    for i in range(steps):
        step(i)
        if (i + 1) % WINDOW == 0:
            if device.type == "cuda":
                torch.cuda.synchronize()
            windows.append((time.perf_counter() - started) / WINDOW)
            started = time.perf_counter()
    return windows


def autocast(given: SimpleNamespace, device: torch.device) -> torch.autocast:
    """Return the context of a forward pass."""
    return torch.autocast(device.type, torch.bfloat16, enabled=given.precision == "bf16")


def text_of(given: SimpleNamespace) -> PreparedText:
    """Return the text that all of them train on."""
    return prepare_text(TextConfig(sequence_length=given.length, val_fraction=0.01), lambda line: None)


def bare_loop(given: SimpleNamespace, device: torch.device) -> tuple[int, list[float]]:
    """Train hvdtrain's model by Horovod, by DDP or in one process; returns the rank and its windows."""
    rank, size = 0, 1
    if given.runner == "horovod":
        import horovod.torch as hvd

        hvd.init()
        rank, size = hvd.rank(), hvd.size()
    elif given.runner == "ddp":
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    text = text_of(given)
    data = TokenWindows(text.train_shards, given.length)
    order = SampleOrder(len(data), BatchPlan(given.batch * size, given.batch, 1, size), 0)
    shape = {"num_layers": given.layers, "hidden_size": given.hidden_size, "num_heads": given.heads}
    config = DecoderConfig(**shape, intermediate_size=given.intermediate_size)
    model = Decoder(config, text.vocab_size, seed=0).to(device)
    if given.compile:
        model.compile()
    trained: torch.nn.Module = torch.nn.parallel.DistributedDataParallel(model) if given.runner == "ddp" else model
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    groups = [{"params": matrices}, {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    if given.runner == "horovod":
        optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)

    def step(i: int) -> None:
        for positions in order.micro_batches(i, rank):
            tokens, targets = (t.to(device) for t in data.batch(order.global_batch(i)[positions]))
            model.zero_grad()
            with autocast(given, device):
                total, count = next_token_loss(trained(tokens), targets)
            (total / count).backward()
        if given.runner == "horovod":
            optimizer.synchronize()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if given.runner == "horovod":
            with optimizer.skip_synchronize():
                optimizer.step()
        else:
            optimizer.step()

    return rank, timed(given.steps, step, device)


def nanogpt_loop(given: SimpleNamespace, device: torch.device) -> tuple[int, list[float]]:
    """Train nanoGPT's model as its train.py does: random windows, the next one read between forward and backward."""
    sys.path.insert(0, given.nanogpt)
    from model import GPT, GPTConfig  # type: ignore[import-not-found]

    is_parallel = given.ranks > 1
    if is_parallel:
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank = torch.distributed.get_rank() if is_parallel else 0
    torch.manual_seed(1337 + rank)
    text = text_of(given)
    tokens = np.memmap(text.train_shards[0].path, dtype=text.train_shards[0].dtype, mode="r")
    shape = {"n_layer": given.layers, "n_head": given.heads, "n_embd": given.hidden_size, "block_size": given.length}
    model = GPT(GPTConfig(**shape, vocab_size=text.vocab_size, dropout=0.0, bias=False)).to(device)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), device.type)
    trained = torch.compile(model) if given.compile else model
    if is_parallel:
        trained = torch.nn.parallel.DistributedDataParallel(trained)

    def batch() -> list[torch.Tensor]:
        starts = torch.randint(len(tokens) - given.length, (given.batch,))
        pair = [
            torch.stack([torch.from_numpy(tokens[i + j : i + j + given.length].astype(np.int64)) for i in starts])
            for j in (0, 1)
        ]
        if device.type == "cuda":
            return [half.pin_memory().to(device, non_blocking=True) for half in pair]
        return pair

    following = batch()

    def step(i: int) -> None:
        nonlocal following
        with autocast(given, device):
            _, loss = trained(*following)
        following = batch()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return rank, timed(given.steps, step, device)


def main() -> None:
    """Be a rank; rank 0 writes its windows to the file that the description names."""
    given = SimpleNamespace(**json.loads(sys.argv[1]))
    loop = nanogpt_loop if given.runner == "nanogpt" else bare_loop
    rank, windows = loop(given, local_device())
    if rank == 0:
        Path(given.times).write_text(json.dumps(windows))


if __name__ == "__main__":
    main()
