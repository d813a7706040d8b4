"""Whether all ranks compute the same: the work of one, done N times, which no loss and no exception shows.

A loop of one process that is started on N ranks does so where every rank reads the same samples: a DataLoader without
a sampler of the ranks, or random numbers from one seed. Rank 0 sees it without asking: the mean is its own gradient.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from hvdtrain.world.world import World

_log = logging.getLogger("hvdtrain")

# So many steps in a row are no chance; so many parameters, and numbers of each, tell one batch from another.
_STEPS, _PARAMETERS, _NUMBERS = 3, 8, 64
# The parts of N ranks are divided and added: each rounds by half of this or less.
_ROUNDINGS = 8


class CopyWatch:
    """Compares this rank's gradients with their means in the first steps, and warns where they are the same.

    It is sent behind all buckets, and received behind them: `.grad` is this rank's own then, and the mean.

    Args:
        world: the ranks.
        parameters: returns those of the optimizer.
    """

    is_sent = False

    def __init__(self, world: World, parameters: Callable[[], Iterable[nn.Parameter]]) -> None:
        self._world, self._parameters = world, parameters
        self._own: list[tuple[nn.Parameter, Tensor]] = []
        self._means: set[int] = set()
        """Where the last means lie. Gradients that backward adds to them there are on the wire before they are seen."""
        self._equal = 0
        """Steps in which all ranks had the same."""
        self.is_over = False

    def send(self) -> None:
        """Keep some numbers of this rank's own gradients."""
        dense = (p for p in self._parameters() if p.grad is not None and p.grad.layout == torch.strided)
        seen = [p for p, _ in zip(dense, range(_PARAMETERS), strict=False)]
        if any(_gradient(p).data_ptr() in self._means for p in seen):
            self._conclude()
            return
        self._own = [(p, _first_of(p).clone()) for p in seen]

    def receive(self) -> None:
        """Compare them with the means."""
        own, self._own = self._own, []
        if not any(bool(numbers.any()) for _, numbers in own):
            return  # nothing to compare: a rank without a batch, or no gradient at all
        if not all(parameter.grad is not None and _are_equal(parameter, numbers) for parameter, numbers in own):
            self.is_over = True
            return
        self._equal += 1
        self._means = {_gradient(parameter).data_ptr() for parameter, _ in own}
        if self._equal == _STEPS:
            self._conclude()

    def _conclude(self) -> None:
        if not self.is_over and self._equal:
            _log.warning(
                "all %d ranks have computed the same gradient, %d times out of %d: they read the same samples, and"
                " together do what one would. Give each rank its own: DataLoader(dataset,"
                " sampler=world.sampler(len(dataset))); and a seed of its own for what it draws:"
                " torch.manual_seed(world.rank)",
                self._world.size,
                self._equal,
                self._equal,
            )
        self.is_over = True


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _first_of(parameter: nn.Parameter) -> Tensor:
    return _gradient(parameter).detach().flatten()[:_NUMBERS]


def _are_equal(parameter: nn.Parameter, own: Tensor) -> bool:
    if _gradient(parameter).layout != torch.strided:  # rows of all ranks have come
        return False
    mean = _first_of(parameter)
    return mean.shape == own.shape and torch.allclose(mean, own, rtol=_ROUNDINGS * torch.finfo(own.dtype).eps, atol=0)
