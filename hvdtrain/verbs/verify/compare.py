"""How far apart two trainings are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from hvdtrain.trainer.state import replicated_tensors
from hvdtrain.verbs.verify.trial import Run
from hvdtrain.world import World, digest_of

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


def bitwise(whole: Run, tensors: dict[str, Tensor]) -> Difference:
    """Return the first tensor that is not bit for bit what another training came to; 0 if there is none."""
    theirs = replicated_tensors(whole.training)
    for key, tensor in tensors.items():
        if int(digest_of(tensor)) != int(digest_of(theirs[key])):
            gap = float((tensor.double() - theirs[key].double()).abs().max())
            return Difference(gap or 5e-324, float("nan"), key)
    return Difference(0.0, 0.0, "")


def in_bits(difference: Difference) -> str:
    """Return a difference where only equality counts."""
    return f"differ by {difference.absolute:.1e}" if difference.absolute else "bitwise"
