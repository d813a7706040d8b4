"""Which samples of a data set are a rank's, for loops that read by a `DataLoader`."""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from hvdtrain.errors import UsageError


class RankSampler(Sampler[int]):
    """Gives each rank its own samples, equally many, in an order that changes with the epoch.

    Every pass over it is the next epoch. Of each epoch's order, the last samples that do not go round are left out:
    other ones each time, where it is shuffled, at most one fewer than there are ranks. None is seen twice.

    `state_dict` and `load_state_dict` hold the epoch, for runs that go on.

    Args:
        num_samples: in the data set, at least one a rank.
        rank: this rank.
        size: number of ranks.
        shuffle: another order in each epoch, alike on all ranks.
        seed: of the order.

    Raises:
        UsageError: there are fewer samples than ranks, or one of these is no whole number.
    """

    def __init__(self, num_samples: int, rank: int, size: int, *, shuffle: bool = True, seed: int = 0) -> None:
        try:
            num_samples = operator.index(num_samples)
        except TypeError:
            raise UsageError(
                f"sampler() takes the number of samples, not an object of type {type(num_samples).__name__}:"
                " world.sampler(len(dataset))"
            ) from None
        try:
            seed = operator.index(seed)
        except TypeError:
            raise UsageError(f"sampler() takes a whole number as its seed, not {seed!r:.80}") from None
        if num_samples < size:
            raise UsageError(f"{num_samples} samples cannot be shared by {size} ranks: start fewer ranks")
        self.epoch = 0
        self._num_samples = num_samples
        self._rank, self._size = rank, size
        self._shuffle, self._seed = shuffle, seed

    def __len__(self) -> int:
        return self._num_samples // self._size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self._seed + 1_000_003 * self.epoch) % 2**63)
        order = torch.randperm(self._num_samples, generator=generator) if self._shuffle else None
        places = torch.arange(self._rank, len(self) * self._size, self._size)
        self.epoch += 1
        yield from (places if order is None else order[places]).tolist()

    def set_epoch(self, epoch: int) -> None:
        """Have the next pass be epoch `epoch`; needed only to go back, or on."""
        self.epoch = epoch

    def state_dict(self) -> dict[str, int]:
        """Return the epoch that the next pass will be."""
        return {"epoch": self.epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on as `state` says."""
        self.epoch = state["epoch"]
