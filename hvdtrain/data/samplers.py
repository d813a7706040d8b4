"""Which sample stands where in an epoch: shuffled, in order, by length, or drawn by weight.

Each is a pure function of (seed, epoch, position): it takes no memory that grows with the data, begins anywhere, and
knows no ranks. So whatever the sampler, a run goes on exactly, on any number of ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hvdtrain.errors import DataError
from hvdtrain.process.arguments import misfit

_ROUNDS = 6
_GIVEN = ("positions", "num_samples", "seed", "epoch")
"""What a sampler is given."""


class Sampler(Protocol):
    """The order of an epoch. An own one is a class with this method.

    Example: a curriculum, from the easiest sample to the hardest, in every epoch.

        class EasyFirst:
            def __init__(self, difficulty):
                self.ranked = np.argsort(difficulty, kind="stable")

            def samples(self, positions, num_samples, seed, epoch):
                return self.ranked[positions]
    """

    def samples(self, positions: NDArray[np.int64], num_samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
        """Return the samples that stand at `positions` of an epoch.

        Args:
            positions: each in `[0, num_samples)`.
            num_samples: of the data, and positions of an epoch.
            seed: of the run.
            epoch: number of the pass over the data, from 0.
        """
        ...


@dataclass(frozen=True)
class Shuffled:
    """Every sample once an epoch, in a pseudo-random order, another one in each epoch."""

    def samples(self, positions: NDArray[np.int64], num_samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
        """Return the samples at `positions`."""
        return permute(positions, num_samples, seed, epoch)


@dataclass(frozen=True)
class InOrder:
    """Every sample once an epoch, in the order of the data."""

    def samples(self, positions: NDArray[np.int64], num_samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
        """Return the samples at `positions`."""
        return positions


class Weighted:
    """Samples drawn with replacement, each as often as its weight says: as many an epoch as there are samples.

    Args:
        weights: of all samples, not negative; only their ratios count.

    Raises:
        DataError: a weight is negative or not finite, or all are 0.
    """

    repeats = True
    """A sample may come more than once in an epoch, and then draws other random numbers each time."""

    def __init__(self, weights: Sequence[float] | NDArray[np.float64]) -> None:
        self.weights = np.asarray(weights, np.float64)
        if self.weights.ndim != 1 or not np.isfinite(self.weights).all() or not (self.weights >= 0).all():
            raise DataError("weights must be numbers of at least 0, one a sample")
        if self.weights.sum() == 0:
            raise DataError("at least one weight must be greater than 0")

    def samples(self, positions: NDArray[np.int64], num_samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
        """Return the samples at `positions`."""
        bounds = np.cumsum(self.weights[:num_samples])
        key = hashlib.blake2b(f"hvdtrain weights {seed} {epoch}".encode(), digest_size=8).digest()
        mixed = _mix(_mix(positions.astype(np.uint64)) ^ np.frombuffer(key, np.uint64)[0])
        uniform = (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53
        drawn: NDArray[np.int64] = np.searchsorted(bounds, uniform * bounds[-1], side="right").astype(np.int64)
        return drawn


class ByLength:
    """Every sample once an epoch, beside samples of about its length: less is padded, and ranks have alike much to do.

    An epoch is shuffled and cut into pools of many batches; each pool is sorted by length and cut into batches, and
    these come in a random order. So batches are drawn anew in each epoch.

    Args:
        lengths: of all samples, in any unit.
        batch_size: samples that shall be alike: a global batch, so that all ranks have the same share of the work.
        pool: batches that are sorted together; the more there are, the less is padded and the less is left to chance.
    """

    def __init__(self, lengths: Sequence[int] | NDArray[np.int64], batch_size: int, pool: int = 32) -> None:
        self.lengths = np.asarray(lengths, np.int64)
        self._batch_size, self._pool = batch_size, pool
        self._known: tuple[tuple[int, int, int], NDArray[np.int64]] | None = None

    def samples(self, positions: NDArray[np.int64], num_samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
        """Return the samples at `positions`."""
        key, known = (num_samples, seed, epoch), self._known
        if known is None or known[0] != key:
            self._known = known = key, self._epoch(*key)
        return known[1][positions]

    def _epoch(self, num_samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
        """Return the samples of an epoch in their order, int64 `(num_samples,)`."""
        places = np.arange(num_samples)
        samples = permute(places, num_samples, seed, epoch)
        pools = places // (self._pool * self._batch_size)
        samples = samples[np.lexsort((self.lengths[samples], pools))]
        full = num_samples // self._batch_size
        batches = samples[: full * self._batch_size].reshape(full, self._batch_size)
        if full > 1:
            batches = batches[permute(np.arange(full), full, seed, ~epoch)]  # no epoch has a number below 0
        return np.concatenate((batches.ravel(), samples[full * self._batch_size :]))


# torch's samplers, which pass once over an order that they draw themselves -> what does so at any place of any epoch.
_INSTEAD = {
    "WeightedRandomSampler": "hvdtrain.Weighted(weights)",
    "SequentialSampler": "hvdtrain.InOrder()",
    "RandomSampler": "nothing, since a task is shuffled anyhow",
    "SubsetRandomSampler": "nothing, and train_data=torch.utils.data.Subset(dataset, indices)",
    "DistributedSampler": "nothing, since ranks are dealt their samples anyhow",
    "BatchSampler": "nothing: --train.global-batch-size says how many samples a step takes",
}


def check_kind(sampler: Any) -> None:
    """Raise DataError where `Task(sampler=...)` is no `Sampler`."""
    if sampler is None or (not isinstance(sampler, type) and callable(getattr(sampler, "samples", None))):
        written = misfit(sampler.samples, len(_GIVEN)) if sampler is not None else ""
        if written:
            raise DataError(
                f"the sampler {type(sampler).__name__} has a method {written}, which cannot be called: write def"
                f" samples(self, {', '.join(_GIVEN)})"
            )
        return
    if isinstance(sampler, type):
        raise DataError(f"Task(sampler={sampler.__name__}) holds a class: make an object, {sampler.__name__}(...)")
    kinds = [kind.__name__ for kind in type(sampler).__mro__]
    instead = next((_INSTEAD[kind] for kind in kinds if kind in _INSTEAD), "a class with that method")
    raise DataError(
        f"Task(sampler=...) holds a {kinds[0]}, which has no method samples(positions, num_samples, seed, epoch): a"
        f" sampler says what stands at any place of any epoch, so that a run goes on exactly. Give {instead}"
    )


def drawn_by(
    sampler: Sampler, positions: NDArray[np.int64], num_samples: int, seed: int, epoch: int
) -> NDArray[np.int64]:
    """Return what a sampler answers, as `Sampler.samples`, whether in an array, a tensor or a list.

    Raises:
        DataError: it answers other things than as many numbers of samples.
    """
    answer = sampler.samples(positions, num_samples, seed, epoch)
    found, name = np.asarray(answer), type(sampler).__name__
    if found.shape != positions.shape or (found.dtype.kind not in "iu" and found.size):
        raise DataError(
            f"samples() of the sampler {name} returned {type(answer).__name__} of shape {found.shape} and type"
            f" {found.dtype} for {len(positions)} positions: return the number of the sample, a whole one, that stands"
            " at each of them"
        )
    if found.size and not 0 <= found.min() <= found.max() < num_samples:
        raise DataError(
            f"samples() of the sampler {name} returned the samples {found.min()} to {found.max()}, and there are those"
            f" from 0 to {num_samples - 1}"
        )
    return np.array(found, dtype=np.int64)  # in one piece, and nobody else's


def check_sampler(sampler: Sampler | None, num_samples: int) -> None:
    """Raise DataError where there is not one weight, or one length, a sample."""
    if isinstance(sampler, Weighted) and len(sampler.weights) != num_samples:
        raise DataError(f"there are {len(sampler.weights):,} weights for {num_samples:,} samples")
    if isinstance(sampler, ByLength) and len(sampler.lengths) != num_samples:
        raise DataError(f"there are {len(sampler.lengths):,} lengths for {num_samples:,} samples")


def permute(positions: NDArray[np.int64], num_samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Map positions in an epoch, each in `[0, num_samples)`, to samples; a bijection for each (seed, epoch).

    A balanced Feistel network permutes `[0, 4**half_bits)`, at most four times `num_samples`; what falls outside goes
    through it again until it falls inside.
    """
    half_bits = max(1, -(-max(1, num_samples - 1).bit_length() // 2))
    keys = np.frombuffer(
        hashlib.blake2b(f"hvdtrain order {seed} {epoch}".encode(), digest_size=8 * _ROUNDS).digest(), dtype=np.uint64
    )
    samples = _feistel(positions.astype(np.uint64), keys, half_bits)
    while (outside := samples >= num_samples).any():
        samples[outside] = _feistel(samples[outside], keys, half_bits)
    return samples.astype(np.int64)


def _feistel(values: NDArray[np.uint64], keys: NDArray[np.uint64], half_bits: int) -> NDArray[np.uint64]:
    bits, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> bits, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << bits) | right


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mix 64 bits (the finalizer of SplitMix64: Steele, Lea and Flood, OOPSLA 2014, section 3)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
