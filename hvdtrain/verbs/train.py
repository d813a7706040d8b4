"""One run of a recipe: from the greeting to the last figures, and the files around the loop."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import re
import socket
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, TypeVar

import tomli_w
import torch

from hvdtrain import __version__
from hvdtrain.errors import ConfigError, ResumeError
from hvdtrain.models.linear import takes_onednn
from hvdtrain.rundir.checkpoint import newest_manifest
from hvdtrain.rundir.environment import describe_environment, describe_rank
from hvdtrain.rundir.log import (
    Console,
    JsonLines,
    MetricLog,
    Sink,
    TensorBoard,
    close_rank_log,
    describe,
    open_rank_log,
)
from hvdtrain.settings import to_dict
from hvdtrain.settings.units import duration, in_units
from hvdtrain.trainer import Job, Recipe, Task, fit, settle
from hvdtrain.trainer.memory import Memory, check_fits, estimate, wire_bytes, without_storage
from hvdtrain.verbs.options import TrainOptions
from hvdtrain.world import Heartbeat, World, watched

T = TypeVar("T")

# Weights below this are taken to fit.
_LARGE_BYTES = 64 << 20


def train(name: str, recipe: Recipe, options: TrainOptions) -> int:
    """Answer `train RECIPE`; returns the exit code. Collective."""
    allowed = options.allow_config_change
    run(name, recipe, options.run_dir, options.dry_run, allowed)
    return 0


def run(
    name: str,
    recipe: Recipe,
    run_dir: Path | None,
    dry_run: bool = False,
    allowed_changes: tuple[str, ...] = (),
) -> dict[str, float]:
    """Train a recipe from its first step, or from the newest checkpoint in `run_dir`, to its last. Collective.

    An exception on any rank ends the job: it is told once, and no rank returns.

    Args:
        name: what the user called the recipe.
        recipe: its settings.
        run_dir: None for a new directory under `runs/`.
        dry_run: say what would be trained, and stop.
        allowed_changes: settings that may differ from those that the run was begun with.

    Returns:
        The last evaluation; nothing after a dry run.

    Raises:
        LaunchError: there is no world: Horovod does not start, or sees other ranks than the launcher.
        SystemExit: on all ranks alike, with the exit code of what rank 0 has told.
    """
    request = _Request(name, recipe, run_dir, dry_run, allowed_changes)
    return watched(recipe, lambda world, heartbeat, unwatched: _run(request, world, heartbeat, unwatched))


@dataclass(frozen=True)
class _Request:
    """What the user asked for."""

    name: str
    recipe: Recipe
    run_dir: Path | None
    dry_run: bool
    allowed_changes: tuple[str, ...]


def _run(request: _Request, world: World, heartbeat: Heartbeat, unwatched: list[int]) -> dict[str, float]:
    name, recipe, run_dir, dry_run = request.name, request.recipe, request.run_dir, request.dry_run
    console = Console(world.launch.launcher == "none" and sys.stdout.isatty()) if world.rank == 0 else None
    with without_storage() if dry_run else contextlib.nullcontext():
        task = world.together(lambda: recipe.build(MetricLog(console, []).say), "build")
    run_dir = world.broadcast_object(run_dir or new_run_dir(name), "run_dir")
    ranks = world.all_gather_object(describe_rank(world.device), "ranks")
    is_writer = world.rank == 0 and not dry_run
    sinks = world.together(lambda: _sinks(run_dir, recipe, task, world, ranks) if is_writer else [], "sinks")
    log = MetricLog(console, sinks)
    before = world.broadcast_object(newest_manifest(run_dir) if world.rank == 0 else None, "before")
    allowed = request.allowed_changes
    job = world.together(lambda: settle(task, recipe, world, run_dir, log, allowed, before), "settle")
    memory = world.together(lambda: _check_memory(job, dry_run), "memory")
    if dry_run:
        log.say(greeting(name, job, ranks))
        log.say(_dry_details(job, memory))
        return {}
    lock = world.together(lambda: _claim(run_dir) if world.rank == 0 else None, "claim")
    log_path = run_dir / "logs" / f"rank-{world.rank:03d}.log"
    handler = world.together(lambda: _open_log(log_path), "log")
    heartbeat.log_to(log_path)
    try:
        log.say(greeting(name, job, ranks))
        if unwatched:
            log.say(
                f"warning:    rank 0 cannot be reached over TCP by rank {', '.join(map(str, unwatched))}:"
                " if one of these hangs, nothing will notice"
            )
        return _train(job)
    finally:
        log.close()
        close_rank_log(handler)
        if lock:
            lock.close()


def _check_memory(job: Job, dry_run: bool) -> Memory | None:
    """Return what training will need; None where that was not looked at: it takes about a second.

    Raises:
        ConfigError: more than there is.
    """
    is_large = sum(parameter.nbytes for parameter in job.task.model.parameters()) > _LARGE_BYTES
    if not dry_run and not (is_large and job.config.health.memory_check):
        return None
    memory = estimate(job)
    if job.config.health.memory_check:
        check_fits(job, memory)
    return memory


def _dry_details(job: Job, memory: Memory | None) -> str:
    """Return the model's parameters by shape, what a rank needs and what it sends."""
    named = job.task.model.named_parameters()
    shapes = Counter((re.sub(r"\.\d+\.", ".*.", name), tuple(parameter.shape)) for name, parameter in named)
    lines = [f"  {count:>4} x {name} {shape}" for (name, shape), count in shapes.items()]
    if memory is not None:
        lines.append(f"memory:     {memory}")
    size, gradients = job.world.size, wire_bytes(job)
    sent = in_units(2 * (size - 1) / size * gradients)
    lines.append(f"network:    {in_units(gradients)} of gradients; in a ring each rank sends {sent} a step")
    return "\n".join(lines)


def _open_log(path: Path) -> logging.Handler:
    try:
        return open_rank_log(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}): choose another --run-dir") from error


def _sinks(run_dir: Path, recipe: Recipe, task: Task, world: World, ranks: list[dict[str, Any]]) -> list[Sink]:
    environment = describe_environment(world.launch.launcher, ranks)
    sinks: list[Sink] = [RunFiles(run_dir, recipe, task, environment), JsonLines(run_dir / "metrics.jsonl")]
    return [*sinks, TensorBoard(run_dir / "tensorboard")] if recipe.log.tensorboard else sinks


def new_run_dir(recipe: str) -> Path:
    """Return where a run of this recipe goes that was given no directory."""
    name = Path(recipe).stem if recipe.endswith(".py") else recipe
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def _takes_onednn(job: Job) -> bool:
    return job.config.train.precision == "fp32" and takes_onednn(job.config.model.linear, job.world.device)


def greeting(name: str, job: Job, ranks: list[dict[str, Any]]) -> str:
    """Return what a person should know before the first step."""
    world, config, task = job.world, job.config, job.task
    hosts = len({rank["host"] for rank in ranks})
    parameters = sum(p.numel() for p in task.model.parameters())
    lines = [
        f"hvdtrain {__version__}: {name} on {_count(world.size, 'rank')}, {_count(hosts, 'host')}, started by"
        f" {world.launch.launcher if world.launch.is_parallel else 'hand'}",
        f"device:     {ranks[0]['device']}, {_count(ranks[0]['threads'], 'thread')} a rank, {config.train.precision}"
        f"{', linear layers by oneDNN' if _takes_onednn(job) else ''}",
        *(f"{line}" for line in task.description.splitlines()),
        f"model:      {type(task.model).__name__}, {parameters:,} parameters",
        f"batch:      {job.plan}",
        f"steps:      {job.num_steps:,}, or {job.num_steps / job.order.steps_per_epoch:.3g} epochs of"
        f" {len(task.train_data):,} samples; {config.optim.name}, peak learning rate {_rate(job)},"
        f" {config.optim.schedule}",
        f"directory:  {job.run_dir}",
    ]
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


class RunFiles:
    """Writes `config.toml`, `environment.json` and `model/` when training begins. A `Sink` that takes no metrics."""

    def __init__(self, run_dir: Path, recipe: Recipe, task: Task, environment: dict[str, Any]) -> None:
        self._run_dir = run_dir
        self._recipe = recipe
        self._task = task
        self._environment = environment

    def begin(self, step: int, num_steps: int) -> None:
        """Write the files; a run that goes on replaces them."""
        (self._run_dir / "config.toml").write_text(tomli_w.dumps(to_dict(self._recipe)))
        (self._run_dir / "environment.json").write_text(json.dumps(self._environment, indent=2) + "\n")
        (self._run_dir / "model").mkdir(exist_ok=True)
        self._task.write_model_files(self._run_dir / "model")

    def write(self, step: int, metrics: Mapping[str, float], event: str | None) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def _train(job: Job) -> dict[str, float]:
    started = time.monotonic()
    metrics = fit(job)
    if job.world.rank == 0:
        job.log.say(f"finished in {duration(time.monotonic() - started)}: {describe(metrics)}")
        with torch.no_grad():
            epilogue = job.task.epilogue(job.task.model, metrics)
        if epilogue:
            job.log.say(epilogue)
        job.log.say(f"everything is in {job.run_dir}")
    job.world.barrier("finished")
    return metrics


def _claim(run_dir: Path) -> TextIO:
    """Make the run directory and lock it for as long as the returned file is open.

    A POSIX lock: the system frees it when its holder dies, and network file systems carry it between hosts.

    Raises:
        ResumeError: another run holds it.
        ConfigError: the directory cannot be made.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = (run_dir / "lock").open("a+")
    except OSError as error:
        raise ConfigError(f"{run_dir} cannot be made ({error.strerror}): choose another --run-dir") from error
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return file  # a file system without locks: nothing can be known
        file.seek(0)
        holder = file.read().strip()
        file.close()
        raise ResumeError(
            f"another run is training in {run_dir} ({holder}): wait for it to end, or choose another --run-dir"
        ) from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
