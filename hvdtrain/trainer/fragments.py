"""When the parts of a model travel, and which parameters each of them has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hvdtrain.settings import CommConfig


@dataclass(frozen=True)
class Schedule:
    """After which steps each fragment begins to travel, and after which its mean is taken."""

    period: int
    fragments: int
    overlap_steps: int
    warmup_steps: int = 0
    """At first, after each of which everything is averaged; periods begin afterwards."""

    @classmethod
    def of(cls, comm: CommConfig) -> Schedule:
        """Return the one that the settings ask for."""
        return cls(comm.period, comm.fragments, comm.overlap_steps, comm.sync_warmup_steps)

    def warms_up(self, step: int) -> bool:
        """Return whether the average after `step` completed steps is one of the first, without an outer optimizer."""
        return step <= self.warmup_steps

    def is_equal_after(self, step: int) -> bool:
        """Return whether all ranks have the same weights after `step` completed steps."""
        if step == 0 or self.warms_up(step):
            return True
        is_whole = self.fragments == 1 and self.overlap_steps == 0
        return is_whole and (step - self.warmup_steps) % self.period == 0

    def averages(self, num_steps: int) -> int:
        """Return how often a fragment begins to travel in so many steps, at the most."""
        first = min(self.warmup_steps, num_steps)
        left, offset = num_steps - first, self.period // self.fragments
        return first + max(left // self.period, (left - offset) // self.period + 1 if self.fragments > 1 else 0)

    def ever_ends(self, num_steps: int) -> bool:
        """Return whether a mean is taken in so many steps after those of the warm-up."""
        first = self.period // self.fragments
        return self.warmup_steps + first + self.overlap_steps <= num_steps

    def begins(self, step: int) -> list[int]:
        """Return the fragments that begin to travel after `step` completed steps."""
        if 0 < step <= self.warmup_steps:
            return [*range(self.fragments)]
        local = step - self.warmup_steps
        offsets = [fragment * self.period // self.fragments for fragment in range(self.fragments)]
        return [p for p, offset in enumerate(offsets) if local > 0 and (local - offset) % self.period == 0]

    def ends(self, step: int) -> list[int]:
        """Return those whose means are taken then."""
        if self.warms_up(step):
            return self.begins(step)
        begun = step - self.overlap_steps
        return [] if self.warms_up(begun) else self.begins(begun)


def in_fragments(sizes: Mapping[str, int], count: int) -> list[list[str]]:
    """Return names in so many lists of neighbours, about equally large; one may be empty.

    Args:
        sizes: of tensors by name, in the model's order.
        count: of the lists.
    """
    fragments: list[list[str]] = [[] for _ in range(count)]
    total, before = max(1, sum(sizes.values())), 0
    for name, size in sizes.items():
        fragments[min(count - 1, count * (2 * before + size) // (2 * total))].append(name)
        before += size
    return fragments
