"""The verb: sets the trial up, runs the checks, shows the table."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from hvdtrain.errors import ConfigError
from hvdtrain.settings import plan_batch
from hvdtrain.trainer import Recipe
from hvdtrain.trainer.precision import settle_precision
from hvdtrain.trainer.task import build_task
from hvdtrain.verbs.kit import Speaker, check_json_path, head_line, write_json
from hvdtrain.verbs.options import VerifyOptions
from hvdtrain.verbs.verify.checks import all_checks
from hvdtrain.verbs.verify.table import HEAD, as_dict, has_passed, shown, verdict
from hvdtrain.verbs.verify.trial import Trial
from hvdtrain.world import World, watched


def verify(name: str, recipe: Recipe, options: VerifyOptions) -> int:
    """Answer `verify RECIPE`; returns 0 if every check passes, else 1. Collective.

    Raises:
        ConfigError: settings do not fit, or the table cannot be written where it should be.
    """
    if options.steps < 2:
        raise ConfigError(f"--steps {options.steps} must be at least 2: one before and one after a save")
    if recipe.comm.sync == "local":
        raise ConfigError(
            "verify checks that ranks train what one process would, which they do not with --comm.sync local: leave it"
            " out"
        )
    return watched(recipe, lambda world, heartbeat, unwatched: _verify(name, recipe, options, world))


def _verify(name: str, recipe: Recipe, options: VerifyOptions, world: World) -> int:
    started = time.monotonic()
    say = Speaker(world.rank == 0)
    world.together(lambda: check_json_path(options.json) if say.speaks else None, "verify.json.path")
    recipe, choice = settle_precision(recipe, world)
    task = world.together(lambda: build_task(recipe, say), "build")
    plan = world.together(lambda: plan_batch(recipe.train, world.size), "plan")
    with tempfile.TemporaryDirectory(prefix="hvdtrain-verify-") as folder:
        shared = world.broadcast_object(Path(folder), "verify.folder")
        trial = Trial(recipe, task, world, plan, shared, options.steps)
        say(head_line("verify", name, world.size, f"global batch {plan.global_batch_size}"))
        if choice:
            say(choice)
        if task.description:
            say(task.description)
        say(HEAD)
        rows = all_checks(trial, lambda row: say(shown(row)))
        world.barrier("verify.folder.end")
    seconds = time.monotonic() - started
    say(verdict(rows, seconds))
    about = {"recipe": name, "ranks": world.size, "launcher": world.launch.launcher, "seconds": round(seconds, 1)}
    world.together(lambda: write_json(options.json, as_dict(rows, about)) if say.speaks else None, "verify.json")
    return 0 if has_passed(rows) else 1
