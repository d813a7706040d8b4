"""The random numbers of a sample, such as those of its augmentation: a function of (seed, epoch, sample).

They know neither the rank nor the batch nor the process that reads the sample. So a sample is augmented alike on any
number of ranks and after a resume, differently from every other sample, and differently in every epoch.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hvdtrain.data.own_generators import Generator, seed_all


@dataclass(frozen=True)
class Draws:
    """What the samples of one batch may draw.

        def batch(self, indices, draws):
            return (torch.stack([self.image(index, draws.generator(i)) for i, index in enumerate(indices)]),)

    Args:
        seed: of the run.
        epoch: number of the pass over the data, from 0.
        keys: int64 `(n,)`, what tells the samples of an epoch apart: their numbers or, where a sample may come more
            than once, their positions in the epoch.
    """

    seed: int
    epoch: int
    keys: Tensor

    def seed_of(self, i: int) -> int:
        """Return the seed, 63 bits, of the batch's sample number `i`."""
        place = f"hvdtrain draws {self.seed} {self.epoch} {int(self.keys[i])}"
        return int.from_bytes(hashlib.blake2b(place.encode(), digest_size=8).digest(), "little") >> 1

    def generator(self, i: int) -> torch.Generator:
        """Return a new generator for the batch's sample number `i`."""
        return torch.Generator().manual_seed(self.seed_of(i))

    def seed_generators(self, i: int, own: Sequence[Generator] = ()) -> None:
        """Seed the generators of torch (on the CPU), numpy and Python for sample number `i`, and a data set's own.

        The first belong to the whole process: no other thread may draw meanwhile.
        """
        seed = self.seed_of(i)
        seed_all(own, seed)
        torch.default_generator.manual_seed(seed)
        seed_numpy_and_python(seed)


@dataclass(frozen=True)
class Request:
    """A batch that is to be read."""

    samples: Tensor
    """int64 `(n,)`."""
    draws: Draws


def seed_numpy_and_python(seed: int) -> None:
    """Seed the generators of the whole process that are not torch's."""
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextlib.contextmanager
def kept_random_state() -> Iterator[tuple[Tensor, Any, Any]]:
    """Put the generators of torch (on the CPU), numpy and Python back as they were: the state that this yields."""
    before = random_state()
    try:
        yield before
    finally:
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])
        random.setstate(before[2])


def random_state() -> tuple[Tensor, Any, Any]:
    """Return the state of the generators of torch (on the CPU), numpy and Python."""
    return torch.get_rng_state(), np.random.get_state(), random.getstate()


def is_same_state(one: tuple[Tensor, Any, Any], other: tuple[Tensor, Any, Any]) -> bool:
    """Tell whether nothing was drawn between two states."""
    (kind, key, *rest), (other_kind, other_key, *other_rest) = one[1], other[1]
    is_same_numpy = kind == other_kind and rest == other_rest and np.array_equal(key, other_key)
    return torch.equal(one[0], other[0]) and is_same_numpy and one[2] == other[2]
