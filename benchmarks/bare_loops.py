"""One rank of the training loops that speed.py holds hvdtrain against: bare ones, and those of other frameworks.

speed.py starts it, with a description of the comparison as JSON. All train hvdtrain's own model on the same batches.
On a GPU machine each rank takes the GPU of its local rank, and collectives are NCCL's.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.optim import AdamW

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
    if getattr(given, "tokens", None):
        train, val = (str(Path(given.tokens) / f"{name}.bin") for name in ("train", "val"))
        config = TextConfig(path=train, val_path=val, vocab_size=given.vocab_size, sequence_length=given.length)
    else:
        config = TextConfig(sequence_length=given.length, val_fraction=0.01)
    return prepare_text(config, lambda line: None)


class Batches:
    """What every loop trains on: text, and the samples of each step in hvdtrain's order.

    Args:
        given: the comparison.
        rank: this process's.
        size: how many processes train.
    """

    def __init__(self, given: SimpleNamespace, rank: int, size: int) -> None:
        self.text = text_of(given)
        self.data = TokenWindows(self.text.train_shards, given.length)
        self._rank = rank
        self._order = SampleOrder(len(self.data), BatchPlan(given.batch * size, given.batch, 1, size), 0)

    def positions(self, step: int) -> torch.Tensor:
        """Return which samples this rank takes in a step."""
        (mine,) = self._order.micro_batches(step, self._rank)
        return self._order.global_batch(step)[mine]

    def of(self, step: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return tokens and targets, `(B, T)` each."""
        tokens, targets = self.data.batch(self.positions(step))
        return tokens.to(device), targets.to(device)


def model_and_optimizer(given: SimpleNamespace, vocab_size: int, device: torch.device) -> tuple[Decoder, AdamW]:
    """Return the model of the comparison and the optimizer that all use."""
    shape = {"num_layers": given.layers, "hidden_size": given.hidden_size, "num_heads": given.heads}
    model = Decoder(DecoderConfig(**shape, intermediate_size=given.intermediate_size), vocab_size, seed=0).to(device)
    if given.compile != "none":
        model.compile()
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    groups = [{"params": matrices}, {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}]
    return model, AdamW(groups, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


def mean_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the loss a token."""
    total, count = next_token_loss(logits, targets)
    return total / count


def hang_hook(trained: Any, given: SimpleNamespace) -> None:
    """Have DistributedDataParallel compress gradients by one of its own communication hooks, if one is asked for."""
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

    hook = getattr(given, "hook", "")
    if hook == "fp16":
        trained.register_comm_hook(None, default_hooks.fp16_compress_hook)
    elif hook == "powersgd":  # the earliest start that it allows with error feedback
        state = powerSGD_hook.PowerSGDState(
            None, matrix_approximation_rank=given.hook_rank, start_powerSGD_iter=2, min_compression_rate=1
        )
        trained.register_comm_hook(state, powerSGD_hook.powerSGD_hook)


def bare_loop(given: SimpleNamespace, device: torch.device) -> tuple[int, list[float]]:
    """Train by Horovod, by DDP or in one process; returns the rank and its windows."""
    rank, size = 0, 1
    if given.runner == "horovod":
        import horovod.torch as hvd

        hvd.init()
        rank, size = hvd.rank(), hvd.size()
    elif given.runner == "ddp":
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    batches = Batches(given, rank, size)
    model, optimizer = model_and_optimizer(given, batches.text.vocab_size, device)
    trained: torch.nn.Module = model
    if given.runner == "ddp":
        # Of several buckets, its PowerSGD hook's all-reduces meet those of other buckets on other ranks: Gloo aborts.
        whole = {"bucket_cap_mb": 1024} if getattr(given, "hook", "") == "powersgd" else {}
        trained = torch.nn.parallel.DistributedDataParallel(model, **whole)
        hang_hook(trained, given)
    if given.runner == "horovod":
        optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)

    def step(i: int) -> None:
        tokens, targets = batches.of(i, device)
        model.zero_grad()
        with autocast(given, device):
            loss = mean_loss(trained(tokens), targets)
        loss.backward()
        if given.runner == "horovod":
            optimizer.synchronize()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if given.runner == "horovod":
            with optimizer.skip_synchronize():
                optimizer.step()
        else:
            optimizer.step()

    return rank, timed(given.steps, step, device)


def accelerate_loop(given: SimpleNamespace, device: torch.device) -> tuple[int, list[float]]:
    """Train by Hugging Face's Accelerate."""
    from accelerate import Accelerator

    precision = "bf16" if given.precision == "bf16" else "no"
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=precision)
    batches = Batches(given, accelerator.process_index, accelerator.num_processes)
    model, optimizer = accelerator.prepare(*model_and_optimizer(given, batches.text.vocab_size, device))

    def step(i: int) -> None:
        tokens, targets = batches.of(i, device)
        optimizer.zero_grad()
        with accelerator.autocast():
            loss = mean_loss(model(tokens), targets)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return accelerator.process_index, timed(given.steps, step, device)


def fabric_loop(given: SimpleNamespace, device: torch.device) -> tuple[int, list[float]]:
    """Train by Lightning Fabric."""
    from lightning.fabric import Fabric

    precision = "bf16-mixed" if given.precision == "bf16" else "32-true"
    strategy = "ddp" if given.ranks > 1 else "auto"
    kind = "cuda" if device.type == "cuda" else "cpu"
    fabric = Fabric(accelerator=kind, devices=given.ranks, strategy=strategy, precision=precision)
    fabric.launch()
    batches = Batches(given, fabric.global_rank, fabric.world_size)
    model, optimizer = fabric.setup(*model_and_optimizer(given, batches.text.vocab_size, device))

    def step(i: int) -> None:
        tokens, targets = batches.of(i, device)
        optimizer.zero_grad()
        with fabric.autocast():  # the loss, too: the model itself has it from Fabric
            loss = mean_loss(model(tokens), targets)
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()

    return fabric.global_rank, timed(given.steps, step, device)


def trainer_loop(given: SimpleNamespace, device: torch.device) -> tuple[int, list[float]]:
    """Train by the Trainer of transformers, with its own sampler and as little besides as it can be told to do."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Windows(TrainerCallback):
        """The mean seconds of each window of steps."""

        def __init__(self) -> None:
            self.seconds: list[float] = []
            self._started = time.perf_counter()

        def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **more: Any) -> None:
            """Note the time."""
            if state.global_step % WINDOW == 0:
                now = time.perf_counter()
                self.seconds.append((now - self._started) / WINDOW)
                self._started = now

    class WithLoss(torch.nn.Module):
        """The model in the form that Trainer asks for."""

        def __init__(self, model: Decoder) -> None:
            super().__init__()
            self.model = model

        def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            """Return the loss by its name."""
            return {"loss": mean_loss(self.model(tokens), labels)}

    class Samples(torch.utils.data.Dataset):  # type: ignore[type-arg]
        """The windows of the text, one by one."""

        def __init__(self, data: TokenWindows) -> None:
            self._data = data

        def __len__(self) -> int:
            return len(self._data)

        def __getitem__(self, position: int) -> dict[str, torch.Tensor]:
            tokens, targets = self._data.batch(torch.tensor([position]))
            return {"tokens": tokens[0], "labels": targets[0]}

    batches = Batches(given, 0, 1)
    model, optimizer = model_and_optimizer(given, batches.text.vocab_size, device)
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    windows = Windows()
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder,
            max_steps=given.steps,
            per_device_train_batch_size=given.batch,
            max_grad_norm=1.0,
            use_cpu=device.type == "cpu",
            ddp_backend=("nccl" if device.type == "cuda" else "gloo") if given.ranks > 1 else None,
            bf16=given.precision == "bf16",
            save_strategy="no",
            eval_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        samples, made = Samples(batches.data), (optimizer, constant)
        trainer = Trainer(WithLoss(model), settings, train_dataset=samples, optimizers=made, callbacks=[windows])
        trainer.train()
    return settings.process_index, windows.seconds


LOOPS: dict[str, Callable[[SimpleNamespace, torch.device], tuple[int, list[float]]]] = {
    "horovod": bare_loop,
    "ddp": bare_loop,
    "one process": bare_loop,
    "accelerate": accelerate_loop,
    "fabric": fabric_loop,
    "hf trainer": trainer_loop,
}


def main() -> None:
    """Be a rank; rank 0 writes its windows to the file that the description names."""
    given = SimpleNamespace(**json.loads(sys.argv[1]))
    rank, windows = LOOPS[given.runner](given, local_device())
    if rank == 0:
        Path(given.times).write_text(json.dumps(windows))


if __name__ == "__main__":
    main()
