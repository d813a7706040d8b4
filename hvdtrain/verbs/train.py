"""One run of a recipe: set up, trained, and its last words. Programs call `train`, the command line `answer`."""

from __future__ import annotations

import dataclasses
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hvdtrain.errors import ConfigError, HvdtrainError, StopRequested, UsageError, reason_of
from hvdtrain.process.early_end import never_silent
from hvdtrain.process.working_directory import is_gone
from hvdtrain.recipes import load_recipe
from hvdtrain.recipes.given import apply, changeable, in_sections, read_toml
from hvdtrain.rundir.directory import RunDirectory
from hvdtrain.rundir.environment import describe_environment, describe_rank
from hvdtrain.rundir.lock import Claim
from hvdtrain.rundir.log import MetricLog, close_rank_log, open_rank_log
from hvdtrain.rundir.sinks import Console, build_sinks, describe
from hvdtrain.settings import NONE, to_dict
from hvdtrain.settings.units import duration
from hvdtrain.settings.values import Source
from hvdtrain.trainer import Job, Recipe, Task, fit, settle
from hvdtrain.trainer.announced import would_announce
from hvdtrain.trainer.fakes import without_storage
from hvdtrain.trainer.memory import checked_estimate, is_large, with_flops_if_large
from hvdtrain.trainer.precision import settle_precision
from hvdtrain.trainer.task import build_task
from hvdtrain.verbs.details import details, going_on
from hvdtrain.verbs.greeting import greeting
from hvdtrain.verbs.options import TrainOptions
from hvdtrain.verbs.report.sink import ReportSink, can_report
from hvdtrain.world import Heartbeat, World, watched

logger = logging.getLogger("hvdtrain")


@dataclass(frozen=True)
class TrainResult:
    """What a run has come to."""

    metrics: dict[str, float]
    """The last evaluation: `val/loss` and others, as in metrics.jsonl."""
    run_dir: Path
    """Directory that holds checkpoints, metrics and logs."""
    step: int
    """Optimizer steps completed."""


def train(
    recipe: str | Path | Recipe,
    *,
    run_dir: str | Path | None = None,
    config: str | Path | None = None,
    allow_config_change: tuple[str, ...] = (),
    **settings: Any,
) -> TrainResult:
    """Train a recipe to its last step: from the first, or from the newest checkpoint in `run_dir`. Collective.

        result = hvdtrain.train("mnist", run_dir="runs/a", epochs=2, optim={"peak_lr": 0.05})
        print(result.metrics["val/accuracy"])

    Under horovodrun, mpirun or srun every rank calls it alike.

    Args:
        recipe: the name of a recipe, the path of a `.py` file, or a `Recipe` of your own.
        run_dir: directory of this run; None for a new one under `runs/`.
        config: TOML file of settings; `settings` win over it.
        allow_config_change: settings, such as "optim.peak_lr", that may differ from those that the run was begun with.
        **settings: a dictionary for each section, with the names of config.toml; values for the recipe's own fields,
            and for the command line's short names, such as `steps=100`, `lr=0.1` or `data="text"`.

    Raises:
        ConfigError: a setting that does not exist, or settings that do not fit together.
        UsageError: data, launcher or run directory that do not fit; the message says what to do.
        StopRequested: a signal came, or the time was used up, and the run has saved; called again, it continues.
        DivergedError: losses or gradients are not finite any more.
        CheckpointError: the last save failed.
    """
    if not isinstance(recipe, str | Path | Recipe):
        raise ConfigError(
            f"train() takes the name of a recipe, the path of its .py file, or a Recipe, not {type(recipe).__name__}"
        )
    name = type(recipe).__name__.lower() if isinstance(recipe, Recipe) else str(recipe)
    chosen = recipe if isinstance(recipe, Recipe) else load_recipe(str(recipe))
    layers = [(read_toml(Path(config)), Source(str(config)))] if config is not None else []
    chosen = apply(chosen, [*layers, (in_sections(settings, chosen), Source("train()"))])
    allowed = changeable(allow_config_change, chosen, Source("train()"))
    request = Request(name, chosen, None if run_dir is None else Path(run_dir), False, allowed)
    return run(request, leaves=False)


def answer(name: str, recipe: Recipe, options: TrainOptions) -> int:
    """Answer `train RECIPE`; returns the exit code. Collective.

    Raises:
        LaunchError: there is no world.
        SystemExit: on all ranks alike, with the exit code of what rank 0 has said.
    """
    with never_silent():
        run(Request(name, recipe, options.run_dir, options.dry_run, options.allow_config_change), leaves=True)
    return 0


@dataclass(frozen=True)
class Request:
    """What the user asked for."""

    name: str
    """What they called the recipe."""
    recipe: Recipe
    run_dir: Path | None
    """None for a new directory under `runs/`."""
    dry_run: bool = False
    """Say what would be trained, and stop."""
    allowed_changes: tuple[str, ...] = ()
    """Settings that may differ from those that the run was begun with."""
    choice: str = ""
    """A line about what `auto` has come to."""


def run(request: Request, leaves: bool) -> TrainResult:
    """Train on all ranks, which watch over each other; see `watched` for `leaves` and what is raised. Collective."""
    return watched(
        request.recipe, lambda world, heartbeat, unwatched: _run(request, world, heartbeat, unwatched), leaves=leaves
    )


def _run(request: Request, world: World, heartbeat: Heartbeat, unwatched: list[int]) -> TrainResult:
    recipe, choice = settle_precision(request.recipe, world)
    request = dataclasses.replace(request, recipe=recipe, choice=choice)
    console = Console(world.launch.launcher == "none" and sys.stdout.isatty()) if world.rank == 0 else None
    if request.dry_run:
        return _dry_run(request, world, MetricLog(console, []))
    # A recipe's code may go elsewhere, and a relative directory would follow it in mid-run.
    here = Path() if is_gone() else Path.cwd()
    task = world.together(lambda: build_task(request.recipe, MetricLog(console, []).say), "build")
    claim = world.together(lambda: _claim(request, here) if world.rank == 0 else None, "claim")
    try:
        run = RunDirectory(here / world.broadcast_object(_below(here, claim.folder) if claim else None, "run_dir"))
        return _train(request, task, world, run, console, heartbeat, unwatched)
    except UsageError as error:
        if error.is_on_all_ranks:
            world.barrier("refused")  # each has closed its log, which goes with the directory
        if claim:
            claim.undo()
        raise
    finally:
        if claim:
            claim.release()


def _claim(request: Request, here: Path) -> Claim:
    if request.run_dir:
        _check_apart(request.recipe, here / request.run_dir)
        return RunDirectory(here / request.run_dir).claim()
    return RunDirectory(here / RunDirectory.new(request.name).path).claim_new()


def _check_apart(recipe: Recipe, run_dir: Path) -> None:
    """Raise ConfigError where a run would lie among its own texts: started again, it would have other data."""
    for name in ("path", "val_path"):
        given = getattr(recipe.data, name, None)
        folder = Path(given).expanduser() if isinstance(given, str) else None
        if folder is not None and folder.is_dir() and folder.resolve() == run_dir.resolve():
            flag = f"--data.{name.replace('_', '-')}"
            raise ConfigError(f"--run-dir {run_dir} is the directory of {flag}, too: choose another --run-dir")


def _below(here: Path, folder: Path) -> Path:
    """Return a directory as seen from `here`, if it lies below: another host may call `here` otherwise."""
    return folder.relative_to(here) if folder.is_relative_to(here) else folder


def _agree(request: Request, world: World) -> RunDirectory:
    """Return the directory that rank 0 has chosen: another rank's clock may be a second ahead. Collective."""
    chosen = RunDirectory(request.run_dir) if request.run_dir else RunDirectory.new(request.name)
    _check_apart(request.recipe, chosen.path)
    return RunDirectory(world.broadcast_object(chosen.path, "run_dir"))


def _settle(request: Request, task: Task, world: World, run: RunDirectory, log: MetricLog) -> Job:
    """Return the job; on another number of ranks, it keeps the global batch of its newest checkpoint. Collective."""
    with world.progress.during("resume"):
        found = world.together(lambda: run.checkpoints.newest_manifest() if world.rank == 0 else None, "newest")
    before = world.broadcast_object(found, "before")
    return world.together(
        lambda: settle(task, request.recipe, world, run, log, request.allowed_changes, before), "settle"
    )


def _dry_run(request: Request, world: World, log: MetricLog) -> TrainResult:
    """Say what would be trained; nothing is written, and no weights take memory. Collective."""
    with without_storage():
        task = world.together(lambda: build_task(request.recipe, log.say), "build")
    run = _agree(request, world)
    ranks = world.all_gather_object(describe_rank(world.device), "ranks")
    job = _settle(request, task, world, run, log)
    job = world.together(lambda: with_flops_if_large(job), "flops")
    memory = world.together(lambda: checked_estimate(job), "memory")
    would_say = world.together(lambda: would_announce(job), "announced")
    resumed = going_on(job)
    log.say(greeting(request.name, job, ranks, request.choice))
    for line in (*would_say, *resumed):
        log.say(line)
    log.say(details(job, memory))
    return TrainResult({}, run.path, 0)


def _train(
    request: Request,
    task: Task,
    world: World,
    run: RunDirectory,
    console: Console | None,
    heartbeat: Heartbeat,
    unwatched: list[int],
) -> TrainResult:
    """Train in a directory that is locked. Collective."""
    ranks = world.all_gather_object(describe_rank(world.device), "ranks")
    is_writer = world.rank == 0
    say = MetricLog(console, []).say
    sinks = world.together(
        lambda: [*build_sinks(run, request.recipe.log, say, task.sinks), *_reports(run, say)] if is_writer else [],
        "sinks",
    )
    log = MetricLog(console, sinks)
    job = _settle(request, task, world, run, log)
    job = with_flops_if_large(job)
    world.together(
        lambda: checked_estimate(job) if is_large(job) and job.config.health.memory_check else None, "memory"
    )
    handler = world.together(lambda: _open_log(run.rank_log(world.rank)), "log")
    heartbeat.log_to(run.rank_log(world.rank))
    try:
        log.say(greeting(request.name, job, ranks, request.choice))
        _warn_of(unwatched, log)
        environment = describe_environment(world.launch.launcher, ranks) if is_writer else {}
        started = time.monotonic()
        metrics = fit(job, lambda: _begin(job, run, environment))
        log.say(f"finished in {duration(time.monotonic() - started)}: {describe(metrics)}")
        _conclude(job, metrics)
        return TrainResult(metrics, run.path, job.num_steps)
    except HvdtrainError as error:  # who leaves prints it; this is for who reads the log, later or elsewhere
        logger.log(logging.INFO if isinstance(error, StopRequested) else logging.ERROR, "%s", error)
        raise
    finally:
        log.close()
        close_rank_log(handler)


def _reports(run: RunDirectory, say: Callable[[str], None]) -> list[ReportSink]:
    """Return what writes reports, where that is installed; behind all sinks, whose files it reads."""
    return [ReportSink(run, say)] if can_report() else []


def _open_log(path: Path) -> logging.Handler:
    try:
        return open_rank_log(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({reason_of(error)}): choose another --run-dir") from error


def _warn_of(unwatched: list[int], log: MetricLog) -> None:
    if unwatched:
        log.say(
            f"warning:    rank 0 cannot be reached over TCP by rank {', '.join(map(str, unwatched))}:"
            " if one of these hangs, nothing will notice"
        )


def _begin(job: Job, run: RunDirectory, environment: dict[str, Any]) -> None:
    if job.world.rank != 0:
        return
    try:
        run.begin(to_dict(job.config, NONE), environment, job.task.write_model_files)
    except OSError as error:
        if not run.config.exists():
            raise ConfigError(f"{run} cannot be written ({error}): choose another --run-dir") from error
        job.log.say(f"WARNING: {run} cannot be written ({error}): what it says of settings, hosts and model is older")


def _conclude(job: Job, metrics: dict[str, float]) -> None:
    """Say what training has come to. Collective."""
    if job.world.rank == 0:
        with torch.no_grad():
            epilogue = job.task.epilogue(job.task.model, metrics)
        if epilogue:
            job.log.say(epilogue)
        job.log.say(f"everything is in {job.run}")
    job.world.barrier("finished")
