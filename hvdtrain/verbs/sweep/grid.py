"""What a sweep trains: every combination of the values given, or some that are drawn; each checked as by `train`."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hvdtrain.errors import ConfigError
from hvdtrain.optim.schedule import check_schedule
from hvdtrain.recipes.given import Layer, apply, flattened_settings
from hvdtrain.settings import NONE, plan_batch, to_dict
from hvdtrain.settings.flags import COMMAND_LINE
from hvdtrain.settings.values import Words, flattened, nested
from hvdtrain.trainer.task import Recipe
from hvdtrain.verbs.options import SweepOptions
from hvdtrain.verbs.sweep.values import Choices, Range, Values, read_values

SEED = "train.seed"
_MOST = 10_000
# How the names of settings begin, each with a dot behind it, that do not change what a trial comes to.
_MAY_DIFFER = ("train.max_time.", "health.stall_limit.", "data.workers.", "data.ahead.", "checkpoint.", "log.")
# So often in a row nothing new may be drawn before all there is counts as drawn.
_MOST_REPEATS = 1000


@dataclass(frozen=True)
class Combination:
    """One value for each setting that differs, and what it is trained with."""

    values: dict[str, Any]
    """Plain values of the settings that differ, by name."""
    settings: dict[str, Any] = field(repr=False)
    """All settings, resolved, as TOML holds them."""
    proposal: int | None = None
    """The proposal of Optuna's that it belongs to: there may be several seeds of one."""


@dataclass(frozen=True)
class Grid:
    """The settings of a sweep."""

    recipe_name: str
    recipe: Recipe = field(repr=False)
    """With its own defaults."""
    layers: tuple[Layer, ...] = field(repr=False)
    """What a file gives."""
    fixed: dict[str, Words]
    """What is the same in all trials."""
    varied: dict[str, Values]
    """What differs."""
    options: SweepOptions
    combinations: tuple[Combination, ...] = ()
    """In the order in which they are trained; none where they are proposed one by one."""

    @property
    def facts(self) -> dict[str, Any]:
        """Return what must be the same where a sweep goes on: it may get more values, but no other settings.

        Settings such as --train.max-time are no part of it: see `binding`.
        """
        kind = "optuna" if self.options.sweep__optuna else "random" if self.options.sweep__random else "grid"
        facts = {
            "recipe": self.recipe_name,
            "fixed": {name: [*words] for name, words in sorted(self.fixed.items())},
            "config": [dict(values) for values, _ in self.layers],
            "search": kind,
            "varied": sorted(self.varied),
        }
        return dict(json.loads(json.dumps({name: binding(value) for name, value in facts.items()}, default=str)))

    @property
    def run_dir(self) -> Path:
        """Return the directory of the sweep; without one given, one that the same command names again."""
        if self.options.run_dir is not None:
            return self.options.run_dir
        digest = hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()[:6]
        stem = Path(self.recipe_name).stem if self.recipe_name.endswith(".py") else self.recipe_name
        return Path("runs") / f"sweep-{stem}-{digest}"

    @property
    def seeds(self) -> tuple[Words, ...]:
        """Return the seeds that each combination that is drawn is trained with; empty: nothing is said of them."""
        values = self.varied.get(SEED)
        return values.values if isinstance(values, Choices) else ()

    @property
    def drawn(self) -> dict[str, Values]:
        """Return what is drawn: all that differs, but the seeds that are listed."""
        return {name: values for name, values in self.varied.items() if name != SEED or not self.seeds}

    @property
    def first(self) -> Recipe:
        """Return the recipe with the first of all values: what `--print-config` shows."""
        return self._applied({name: values.corners()[0] for name, values in self.varied.items()})

    def _applied(self, words: Mapping[str, Words]) -> Recipe:
        return apply(self.recipe, [*self.layers, (nested({**self.fixed, **words}), COMMAND_LINE)])

    def combination(self, words: Mapping[str, Words], proposal: int | None = None) -> Combination:
        """Return the settings of a trial.

        Raises:
            ConfigError: `train` would refuse them.
        """
        try:
            recipe = self._applied(words)
            if not self.options.slurm and not self.options.launcher:
                plan_batch(recipe.train, self.options.np)
            if recipe.train.steps is not None:
                check_schedule(recipe.optim, recipe.train.steps)
        except ConfigError as error:
            where = ", ".join(f"{COMMAND_LINE.name(name)} {' '.join(value)}" for name, value in words.items())
            raise ConfigError(f"with {where}: {error}" if where else str(error)) from error
        settings = to_dict(recipe, NONE)
        plain = flattened(settings)
        known = flattened_settings(recipe)
        values = {name: plain[name] if known[name] is not None else None for name in self.varied}
        return Combination(values, settings, proposal)

    def with_seeds(self, words: Mapping[str, Words], proposal: int | None = None) -> Iterator[Combination]:
        """Yield a combination that was drawn with each of the seeds."""
        for seed in self.seeds or (None,):
            more = {SEED: seed} if seed is not None else {}
            yield self.combination({**words, **more}, proposal)


def binding(fact: Any, prefix: str = "") -> Any:
    """Return a fact of a sweep without the settings that may differ where it goes on, such as --train.max-time."""
    if isinstance(fact, Mapping):
        names = {name: f"{prefix}{name}.".replace("-", "_") for name in fact}
        return {name: binding(fact[name], full) for name, full in names.items() if not full.startswith(_MAY_DIFFER)}
    return [binding(item) for item in fact] if isinstance(fact, list) else fact


def read_grid(
    name: str,
    recipe: Recipe,
    layers: Sequence[Layer],
    given: Mapping[str, Words],
    hints: Mapping[str, Any],
    options: SweepOptions,
) -> Grid:
    """Return what a command line asks for, every combination checked.

    Args:
        name: what the user called the recipe.
        recipe: its own settings.
        layers: values of files.
        given: the words of each setting that was given.
        hints: the types of settings.
        options: those of the sweep.

    Raises:
        ConfigError: nothing differs, or one of the combinations is refused.
    """
    has_ranges = bool(options.sweep__random or options.sweep__optuna)
    values = {key: read_values(words, hints[key], key, has_ranges) for key, words in given.items()}
    varied = {key: one for key, one in values.items() if isinstance(one, Range) or len(one.values) > 1}
    fixed = {key: one.values[0] for key, one in values.items() if isinstance(one, Choices) and key not in varied}
    if not varied:
        raise ConfigError(
            "a sweep is given several values of a setting, such as --optim.peak-lr 1e-4,3e-4,1e-3; train takes one of"
            " each"
        )
    grid = Grid(name, recipe, tuple(layers), fixed, varied, options)
    if has_ranges and not grid.drawn:
        raise ConfigError("give more to draw from than --train.seed, whose values are all trained")
    if options.sweep__optuna:
        _check_corners(grid)
        return grid
    found = tuple(_drawn(grid, options.sweep__random) if options.sweep__random else _all(grid))
    return replace(grid, combinations=found)


def _all(grid: Grid) -> Iterator[Combination]:
    lists = {name: values.corners() for name, values in grid.varied.items()}
    number = math.prod(map(len, lists.values()))
    if number > _MOST:
        raise ConfigError(
            f"these are {number:,} trials, more than {_MOST:,}: list fewer values, or give --sweep.random N"
        )
    for words in itertools.product(*lists.values()):
        yield grid.combination(dict(zip(lists, words, strict=True)))


def _drawn(grid: Grid, number: int) -> Iterator[Combination]:
    """Yield combinations that differ; a larger number only adds to those of a smaller one."""
    seen: set[tuple[Words, ...]] = set()
    repeats = attempt = 0
    while len(seen) < number and repeats < _MOST_REPEATS:
        words = draw_words(grid, attempt)
        attempt += 1
        key = tuple(words.values())
        repeats = repeats + 1 if key in seen else 0
        if key not in seen:
            seen.add(key)
            yield from grid.with_seeds(words)


def draw_words(grid: Grid, attempt: int) -> dict[str, Words]:
    """Return a value for each setting that is drawn: a function of seed, attempt and the setting's name alone."""
    seed = grid.options.sweep__seed
    return {name: values.draw(random.Random(f"{seed}/{attempt}/{name}")) for name, values in grid.drawn.items()}


def _check_corners(grid: Grid) -> None:
    """Check each value that Optuna may propose, and the bounds of ranges, beside the first of all others."""
    first = {name: values.corners()[0] for name, values in grid.drawn.items()}
    for name, values in grid.drawn.items():
        for corner in values.corners():
            [*grid.with_seeds({**first, name: corner})]


def label_of(values: Mapping[str, Any], names: Iterable[str]) -> str:
    """Return a trial in words: "peak-lr 0.0003, seed 1"."""
    return ", ".join(f"{short_label(name, values)} {shown(values[name])}" for name in names if name in values)


def short_label(name: str, among: Iterable[str]) -> str:
    """Return a setting's name without its section, where no other ends alike."""
    last = name.rpartition(".")[2]
    is_alone = sum(other.rpartition(".")[2] == last for other in among) == 1
    return (last if is_alone else name).replace("_", "-")


def shown(value: Any) -> str:
    """Return a value as a person reads it."""
    if value is None:
        return NONE
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
