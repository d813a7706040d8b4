"""Trials that Optuna's TPE sampler (arXiv:2304.11127) proposes from what earlier ones have reached. Extra `sweep`."""

from __future__ import annotations

import importlib.util
import statistics
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from hvdtrain.errors import ConfigError
from hvdtrain.settings.values import Words
from hvdtrain.verbs.sweep.grid import Grid
from hvdtrain.verbs.sweep.results import Result
from hvdtrain.verbs.sweep.values import Range, Values


def check_optuna() -> None:
    """Raise ConfigError where Optuna is not installed."""
    if importlib.util.find_spec("optuna") is None:
        raise ConfigError(
            "--sweep.optuna needs Optuna, which is not installed here: pip install optuna, or give --sweep.random"
        )


def propose(grid: Grid, number: int, results: Sequence[Result]) -> dict[str, Words]:
    """Return the values of a proposal: a function of its number, the seed, and what earlier proposals have reached.

    So a sweep that was broken off proposes what it would have proposed. Of a proposal with several seeds the mean
    counts; one that has failed does not.

    Args:
        grid: what may be proposed.
        number: how many proposals came before.
        results: of the trials so far.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is experimental in Optuna, nothing is used
        sampler = optuna.samplers.TPESampler(seed=hash_of(grid.options.sweep__seed, number))
    goal = "minimize" if grid.options.sweep__goal == "min" else "maximize"
    study = optuna.create_study(sampler=sampler, direction=goal)
    space = {name: _distribution(optuna, values) for name, values in grid.drawn.items()}
    listed = {name: [plain_value(grid, name, one) for one in values.corners()] for name, values in grid.drawn.items()}
    for earlier in range(number):
        own = [one for one in results if one.trial.proposal == earlier]
        reached = [one.final for one in own if one.state == "finished" and one.final is not None]
        if own and reached and all(_is_in(own[0].trial.values[name], grid.drawn[name], listed[name]) for name in space):
            # Of a range the number, of a list the place.
            params = {
                name: value if isinstance(grid.drawn[name], Range) else listed[name].index(value)
                for name, value in own[0].trial.values.items()
                if name in space
            }
            value = statistics.fmean(reached)
            study.add_trial(optuna.trial.create_trial(params=params, distributions=space, value=value))
    asked = study.ask(space)
    return {name: _as_words(asked.params[name], values) for name, values in grid.drawn.items()}


def hash_of(seed: int, number: int) -> int:
    """Return a seed of 32 bits for a proposal: another for each number, near in none of its bits."""
    return (seed * 0x9E3779B1 + (number + 1) * 0x85EBCA6B) % 2**32


def _distribution(optuna: Any, values: Values) -> Any:
    if isinstance(values, Range):
        kind = optuna.distributions.IntDistribution if values.is_whole else optuna.distributions.FloatDistribution
        return kind(values.low, values.high, log=values.is_log)
    return optuna.distributions.CategoricalDistribution([*range(len(values.values))])


def _as_words(param: Any, values: Values) -> Words:
    return values.words(param) if isinstance(values, Range) else values.values[param]


def _is_in(value: Any, values: Values, listed: Sequence[Any]) -> bool:
    """Tell whether a trial's value could be proposed still: a sweep may go on with other values."""
    return values.low <= value <= values.high if isinstance(values, Range) else value in listed


def plain_value(grid: Grid, name: str, words: Words) -> Any:
    """Return the plain value that words stand for, as trials hold it."""
    others: Mapping[str, Words] = {other: values.corners()[0] for other, values in grid.varied.items() if other != name}
    return grid.combination({**others, name: words}).values[name]
