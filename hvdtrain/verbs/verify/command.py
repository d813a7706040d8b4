"""The verb: sets the trial up, runs the checks, shows the table."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

from hvdtrain import __version__
from hvdtrain.errors import ConfigError
from hvdtrain.settings import plan_batch
from hvdtrain.trainer import Recipe
from hvdtrain.verbs.options import VerifyOptions
from hvdtrain.verbs.verify.checks import all_checks
from hvdtrain.verbs.verify.table import Row, as_dict, as_table
from hvdtrain.verbs.verify.trial import Trial
from hvdtrain.world import World, watched


def verify(name: str, recipe: Recipe, options: VerifyOptions) -> int:
    """Answer `verify RECIPE`; returns 0 if every check passes, else 1. Collective.

    Raises:
        ConfigError: settings do not fit, or the table cannot be written where it should be.
    """
    if options.steps < 2:
        raise ConfigError(f"--steps {options.steps} must be at least 2: one before and one after a save")
    return watched(recipe, lambda world, heartbeat, unwatched: _verify(name, recipe, options, world))


def _verify(name: str, recipe: Recipe, options: VerifyOptions, world: World) -> int:
    started = time.monotonic()
    say = _Console(world)
    task = world.together(lambda: recipe.build(say), "build")
    plan = world.together(lambda: plan_batch(recipe.train, world.size), "plan")
    with tempfile.TemporaryDirectory(prefix="hvdtrain-verify-") as folder:
        shared = world.broadcast_object(Path(folder), "verify.folder")
        trial = Trial(recipe, task, world, plan, shared, options.steps)
        ranks = "1 rank" if world.size == 1 else f"{world.size} ranks"
        say(f"hvdtrain {__version__}: verify {name} on {ranks}, global batch {plan.global_batch_size}")
        rows = all_checks(trial, say.row)
        world.barrier("verify.folder.end")
    failed = [row for row in rows if row.status == "FAIL"]
    seconds = time.monotonic() - started
    warnings = sum(row.status == "warning" for row in rows)
    verdict = f"{len(failed)} FAILED" if failed else "all checks passed"
    say(f"{verdict}, {warnings} warning{'' if warnings == 1 else 's'}, in {seconds:.0f} s")
    about = {"recipe": name, "ranks": world.size, "launcher": world.launch.launcher, "seconds": round(seconds, 1)}
    world.together(lambda: _write(options.json, rows, about) if world.rank == 0 else None, "verify.json")
    return 1 if failed else 0


def _write(path: Path | None, rows: list[Row], about: dict[str, object]) -> None:
    if path is None:
        return
    try:
        path.write_text(json.dumps(as_dict(rows, about), indent=2) + "\n")
    except OSError as error:
        raise ConfigError(f"--json {path} cannot be written: {error.strerror}") from error


class _Console:
    """Rank 0 speaks; the table's head comes with its first row."""

    def __init__(self, world: World) -> None:
        self._speaks = world.rank == 0
        self._has_head = False

    def __call__(self, text: str) -> None:
        if self._speaks:
            sys.stdout.write(text + "\n")
            sys.stdout.flush()

    def row(self, row: Row) -> None:
        """Show a row as soon as it is known."""
        lines = as_table([row])
        self(lines if not self._has_head else lines.partition("\n")[2])
        self._has_head = True
