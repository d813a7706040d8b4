"""Options of the optimizer's groups that a run goes on with by other settings than it was saved with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hvdtrain.data.draws import kept_random_state
from hvdtrain.errors import ConfigError
from hvdtrain.settings import OptimConfig

if TYPE_CHECKING:
    from hvdtrain.trainer.job import Job

# Set before every step.
_RATES = ("lr", "initial_lr")

Options = Sequence[Mapping[str, Any]]
"""Of each group, those that are others."""


def changed_options(job: Job, model: nn.Module, then: Mapping[str, Any]) -> Options:
    """Return what settings that were changed since then, as was allowed, make of the options of the groups.

    A state that is loaded brings the options that it was saved with, those too that code of the user's has set since:
    only what settings make another is to be another.

    Args:
        job: with the settings of now.
        model: whose parameters are trained.
        then: the settings of `optim` that the checkpoint was saved with.
    """
    now = job.config.optim
    before = _settings_then(now, then)
    if before is None or before == now:
        return []
    with kept_random_state():
        groups_then, groups = (job.task.build_optimizer(optim, model).param_groups for optim in (before, now))
    if len(groups_then) != len(groups):
        return []
    return [
        {
            key: value
            for key, value in group.items()
            if key != "params" and key not in _RATES and not (key in old and _are_equal(value, old[key]))
        }
        for old, group in zip(groups_then, groups, strict=True)
    ]


def with_options(state: Mapping[str, Any], options: Options) -> Mapping[str, Any]:
    """Return an optimizer's state with these options in its groups."""
    groups = state.get("param_groups")
    if not isinstance(groups, list) or len(groups) != len(options):
        return state
    return {**state, "param_groups": [{**group, **own} for group, own in zip(groups, options, strict=True)]}


def _settings_then(now: OptimConfig, then: Mapping[str, Any]) -> OptimConfig | None:
    """Return the settings of then; None where they are of another version, which knew others."""
    values = {item.name: then[item.name] for item in dataclasses.fields(now) if item.init and item.name in then}
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    try:
        return dataclasses.replace(now, **values)
    except (ConfigError, TypeError, ValueError):
        return None


def _are_equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
    return bool(one == other)
