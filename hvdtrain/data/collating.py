"""A user's function that makes a batch of samples, and whether it draws random numbers: they belong to no sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.utils.data import default_collate

from hvdtrain.data.draws import is_same_state, random_state
from hvdtrain.data.own_generators import Generator, states_of

Collate = Callable[[list[Any]], Any]


class Collating:
    """Calls a function that makes a batch of a list of samples.

    Args:
        function: None for torch's `default_collate`.
    """

    def __init__(self, function: Collate | None) -> None:
        self.function = function or default_collate
        self.draws: bool | None = False if self.is_default else None
        """Whether it draws random numbers; None before the first call."""

    @property
    def is_default(self) -> bool:
        """Return whether it is torch's own."""
        return self.function is default_collate

    def __call__(self, samples: list[Any], generators: Sequence[Generator]) -> Any:
        """Return the batch; `generators` are the data's own, besides torch's, numpy's and Python's."""
        if self.draws is not None:
            return self.function(samples)
        before, own = random_state(), states_of(generators)
        batch = self.function(samples)
        self.draws = not is_same_state(before, random_state()) or own != states_of(generators)
        return batch
