"""What a person should know before the first step."""

from __future__ import annotations

import os
from typing import Any

import torch

from hvdtrain import __version__
from hvdtrain.errors import counted
from hvdtrain.models.linear import takes_onednn
from hvdtrain.optim.schedule import describe_schedule
from hvdtrain.trainer import Job
from hvdtrain.trainer.compiling import what_is_compiled
from hvdtrain.trainer.peaks import product_type
from hvdtrain.trainer.precision import takes_onednn_attention
from hvdtrain.trainer.space import space_warning
from hvdtrain.trainer.without_effect import without_effect
from hvdtrain.world.unused_gpus import unused_gpus


def greeting(name: str, job: Job, ranks: list[dict[str, Any]], choice: str = "") -> str:
    """Return what a person should know before the first step; `choice` is a line about what `auto` has come to."""
    world, config, task = job.world, job.config, job.task
    hosts = len({rank["host"] for rank in ranks})
    parameters, trained = sum(p.numel() for p in task.model.parameters()), num_trained(job)
    frozen = "" if trained == parameters else f", {trained:,} of them trained"
    lines = [
        f"hvdtrain {__version__}: {name} on {counted(world.size, 'rank')}, {counted(hosts, 'host')}, started by"
        f" {world.launch.launcher if world.launch.is_parallel else 'hand'}",
        f"device:     {ranks[0]['device']}, {counted(ranks[0]['threads'], 'thread')} a rank, {config.train.precision}"
        f"{', deterministic' if config.train.deterministic else ''}{_compiled(job)}"
        f"{_by_onednn(job)}",
        *([choice] if choice else []),
        *(f"{line}" for line in task.description.splitlines()),
        f"model:      {type(task.model).__name__}, {parameters:,} parameters{frozen}",
        f"batch:      {job.plan}",
        f"steps:      {job.num_steps:,}, or {job.num_steps / job.order.steps_per_epoch:.3g} epochs of"
        f" {len(task.train_data):,} samples; {config.optim.name}, peak learning rate {_rate(job)},"
        f" {describe_schedule(config.optim, job.num_steps)}",
        f"directory:  {job.run}",
        *without_effect(job),
        *(space_warning(job) if world.rank == 0 else []),
    ]
    unused = unused_gpus() if world.device.type == "cpu" else ""
    if unused:
        lines.append(
            f"warning:    trains on the CPU, with GPUs {unused}. CUDA_VISIBLE_DEVICES= (empty) says that it is meant"
        )
    cores, machine = ranks[0]["cores"], os.cpu_count() or 1
    if world.launch.launcher == "mpirun" and cores < machine // world.local_size:
        lines.append(f"warning:    mpirun binds each rank to {cores} of {machine} cores: add --bind-to none to it")
    return "\n".join(lines)


def _rate(job: Job) -> str:
    """Return the peak learning rate, and how a rule comes to it."""
    optim = job.config.optim
    if optim.lr_rule == "none":
        return f"{optim.peak_lr:g}"
    return (
        f"{optim.peak_lr * job.lr_factor:g} ({optim.peak_lr:g} for a batch of {optim.reference_batch}, {optim.lr_rule}"
        f" rule for {job.plan.global_batch_size})"
    )


def _compiled(job: Job) -> str:
    what = what_is_compiled(job.config.model, job.task.model, job.world.device)
    return {"none": "", "model": ", compiled", "blocks": ", compiled blocks"}[what]


def num_trained(job: Job) -> int:
    """Return how many numbers of the model learn."""
    return sum(parameter.numel() for parameter in job.task.model.parameters() if parameter.requires_grad)


def _by_onednn(job: Job) -> str:
    library, device, precision = job.config.model.linear, job.world.device, job.config.train.precision
    if precision == "fp32" and takes_onednn(library, device):
        return ", linear layers by oneDNN"
    is_bf16 = product_type(precision) == torch.bfloat16
    return ", attention by oneDNN" if is_bf16 and takes_onednn_attention(library, device) else ""
