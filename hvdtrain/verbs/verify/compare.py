"""How far apart two trainings are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from hvdtrain.verbs.verify.trial import Run
from hvdtrain.world import World

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Difference:
    """The largest difference of any element, and the tensor where it is."""

    absolute: float
    relative: float
    """Share of the largest change of any weight since the start."""
    name: str

    def __str__(self) -> str:
        return f"{self.absolute:.1e}, relative {self.relative:.1e}"


def between(one: Tensors, other: Tensors, scale: float) -> Difference:
    """Return the largest difference of two sets of tensors of the same names, relative to `scale`.

    A number that is not finite counts as infinitely far away.
    """
    worst = Difference(0.0, 0.0, "")
    for name in one:
        if not one[name].numel():
            continue
        gap = (one[name].double() - other[name].double()).abs()
        absolute = float(gap.nan_to_num(nan=float("inf")).max())
        if absolute > worst.absolute:
            worst = Difference(absolute, absolute / scale if scale else float("inf"), name)
    return worst


def movement(run: Run) -> float:
    """Return the largest change of any weight since the start."""
    moved = {name: tensor for name, tensor in run.weights.items() if name in run.start}
    return between(moved, run.start, 1.0).absolute


def worst_of(world: World, difference: Difference, name: str) -> tuple[Difference, int]:
    """Return the largest difference on any rank, and the rank. Collective."""
    everyone = world.all_gather_object(difference, f"verify.{name}")
    rank = max(range(len(everyone)), key=lambda rank: everyone[rank].absolute)
    return everyone[rank], rank
