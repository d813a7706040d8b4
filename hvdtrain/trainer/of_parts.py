"""Whether the losses of a micro-batch's parts make its loss: where they do not, it is another one on other ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hvdtrain.data.draws import is_same_state, random_state
from hvdtrain.data.own_generators import Generator, states_of
from hvdtrain.trainer.task import Task

# Rounding in fp32 is far below the first, in the 16-bit types and tf32 below the second.
_FINE, _COARSE = 1e-3, 2e-2


class Drawn:
    """Tells whether anything was drawn at random since this was made: what is drawn differs from pass to pass.

    Args:
        own: generators that the model or its loss keeps.
    """

    def __init__(self, own: Sequence[Generator]) -> None:
        self._own, self._before = own, (random_state(), _states_of_gpus(), states_of(own))

    def __bool__(self) -> bool:
        on_host, on_gpus, own = self._before
        is_same = is_same_state(on_host, random_state()) and own == states_of(self._own)
        return not is_same or any(map(_differ, on_gpus, _states_of_gpus()))


def why_not_of_parts(
    task: Task,
    parts: tuple[Mapping[str, Any], Mapping[str, Any]],
    whole: Mapping[str, Any],
    share: float,
    precision: str,
) -> str:
    """Return a warning where two parts of a micro-batch do not make a figure of the whole; empty where they do.

    Args:
        task: says whether figures are sums or means.
        parts: what `loss_sums` has returned for each.
        whole: the same for both together.
        share: of the samples, those in the first.
        precision: as `--train.precision`.
    """
    tolerance = _FINE if precision in ("fp32", "fp64") else _COARSE
    weights = (share, 1 - share) if task.reduction == "mean" else (1.0, 1.0)
    all_values = (*parts, whole)
    for name in task.metrics:
        one, other, both = (float(values[name]) for values in all_values)
        made = weights[0] * one + weights[1] * other
        scale = max(abs(one), abs(other), abs(both))
        if name != "loss":
            # Differences of what is equal, as a reward before the first step, are rounding; and it decides who of two
            # with the same score is counted.
            scale = max(scale, *(abs(float(values["loss"])) for values in all_values))
            if one.is_integer() and other.is_integer() and both.is_integer():
                continue
        is_other = abs(made - both) > tolerance * scale  # never so for nan
        if is_other or (math.isfinite(both) and math.isnan(made)):
            return f"WARNING: {_explain(task.reduction, name, both, made)}"
    return ""


def _explain(reduction: str, name: str, both: float, made: float) -> str:
    figure = f"the '{name}' of some samples, {both:.6g}, is not the {reduction} of those of their parts, {made:.6g}"
    if name != "loss":
        return (
            f"{figure}: it depends on which samples are together, so that on another number of ranks, or with another"
            " --train.micro-batch-size, it is another figure (the loss is not concerned)"
        )
    if reduction == "mean":
        return (
            f"{figure}, by their numbers of samples: on another number of ranks, or with another"
            " --train.micro-batch-size, another loss is trained. Where labels are passed over (ignore_index), count"
            " the others in a method num_targets(indices) of the data set; where they are weighted, return sums"
            " (reduction='sum'). A loss that compares samples with each other is that of each rank's own samples"
        )
    return (
        f"{figure}: it depends on which samples are together, so that on another number of ranks, or with another"
        " --train.micro-batch-size, another loss is trained"
    )


def _states_of_gpus() -> list[torch.Tensor]:
    return torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []


def _differ(one: torch.Tensor, other: torch.Tensor) -> bool:
    return not torch.equal(one, other)
