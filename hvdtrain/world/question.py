"""A question to all ranks that travels with the gradients: does any of them say yes?

A collective of its own costs a small model's step as much as its gradients do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from hvdtrain.world.world import World
    from hvdtrain.world.wrapped import WrappedOptimizer

# The share of ranks that have a gradient, at the end of a bucket, is at most 1: what exceeds that are answers. It
# takes no room of its own, as other lengths would change in which order the ranks' parts are added.
_YES = 2.0


class Question:
    """What a rank answers, and afterwards whether any has said yes. One bucket carries it."""

    def __init__(self) -> None:
        self._own = False
        self.is_carried = False
        """Whether there is a bucket that can, of dense gradients in host memory: a GPU would have to be waited for."""
        self.answer: bool | None = None
        """Alike on all ranks; None while gradients have not been averaged since it was asked."""

    def ask(self, own: bool) -> None:
        """Answer it on this rank, before its backward passes."""
        self._own, self.answer = own, None

    def write(self, shares: Tensor, divisor: int = 1) -> None:
        """Put the answer into the shares, `(n,)` with n > 0, of ranks that have each gradient.

        Their sum is divided by `divisor` afterwards.
        """
        if self._own:
            shares[0] += _YES * divisor

    def read(self, shares: Tensor) -> None:
        """Take the answers of all ranks out of the sums of their shares."""
        total = float(shares[0])
        self.answer = total >= _YES - 0.5  # shares are rounded
        if self.answer:
            shares[0] = total % _YES


def ask_with_gradients(world: World, optimizer: WrappedOptimizer, own: bool, name: str) -> Callable[[], bool]:
    """Ask all ranks before a step; returns what tells, after it, whether any has said yes. Both are collective.

    Where the step averages no gradients that could carry it, the question travels by itself.
    """
    if world.size == 1:
        return lambda: own
    question = optimizer.question
    if question is None or not question.is_carried:
        wait = world.start_all_reduce(torch.tensor(float(own), device="cpu"), "max", name)
        return lambda: bool(wait())
    question.ask(own)

    def answer() -> bool:
        return bool(world.all_reduce(float(own), "max", name)) if question.answer is None else question.answer

    return answer
