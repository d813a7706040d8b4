"""Which samples a step sees: a pure function of (seed, step) that does not depend on the number of ranks.

Each epoch visits every sample exactly once, in the order of a pseudo-random permutation that is computed where it is
needed (a Feistel network with cycle walking: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA
2002, methods 2 and 3), so it takes no memory and can start anywhere. Global batch k of an epoch is a slice of the
permutation; a rank takes its part of the slice. The last slice of an epoch may be shorter.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hvdtrain.data.dataset import contiguous_share, in_batches
from hvdtrain.errors import ConfigError
from hvdtrain.settings import BatchPlan

_ROUNDS = 6


@dataclass(frozen=True)
class SampleOrder:
    """The order in which training visits the samples.

    Raises:
        ConfigError: there are fewer samples than a global batch takes.
    """

    num_samples: int
    plan: BatchPlan
    seed: int

    def __post_init__(self) -> None:
        if self.num_samples < self.plan.global_batch_size:
            raise ConfigError(
                f"a global batch of {self.plan.global_batch_size} samples on {self.plan.world_size} ranks needs at"
                f" least as many, but the training data has {self.num_samples}: use more data, fewer ranks"
                " or a smaller --train.global-batch-size"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Return the optimizer steps of one pass over the data, the shorter last one included."""
        return -(-self.num_samples // self.plan.global_batch_size)

    def samples_before(self, step: int) -> int:
        """Return how many samples `step` completed steps have seen, each as often as it was seen."""
        epoch, k = divmod(step, self.steps_per_epoch)
        return epoch * self.num_samples + k * self.plan.global_batch_size

    def epoch(self, step: int) -> int:
        """Return the number of the pass over the data, from 0, that the step after `step` completed ones is in."""
        return step // self.steps_per_epoch

    def global_batch(self, step: int) -> Tensor:
        """Return the samples, int64 `(n,)`, of the step that follows `step` completed ones, over all ranks."""
        epoch, k = divmod(step, self.steps_per_epoch)
        start = k * self.plan.global_batch_size
        stop = min(start + self.plan.global_batch_size, self.num_samples)
        return torch.from_numpy(permute(np.arange(start, stop), self.num_samples, self.seed, epoch))

    def micro_batches(self, step: int, rank: int, in_step: bool = False) -> list[Tensor]:
        """Return the positions in `global_batch(step)`, int64 `(n,)`, of each of a rank's micro-batches.

        In a short batch there are perhaps fewer than usual, or none; with `in_step`, empty ones take their place up to
        as many as the rank with the most has.
        """
        epoch_step = step % self.steps_per_epoch
        num_samples = min(self.plan.global_batch_size, self.num_samples - epoch_step * self.plan.global_batch_size)
        share = contiguous_share(num_samples, rank, self.plan.world_size)
        batches = in_batches(share, self.plan.micro_batch_size)
        if in_step:
            largest_share = -(-num_samples // self.plan.world_size)
            most = -(-largest_share // self.plan.micro_batch_size)
            batches += [share[:0]] * (most - len(batches))
        return batches

    def batches(self, step: int, rank: int, in_step: bool = False) -> list[Tensor]:
        """Return the samples, int64 `(n,)`, of each of a rank's micro-batches, as `micro_batches` cuts the step."""
        samples = self.global_batch(step)
        return [samples[positions] for positions in self.micro_batches(step, rank, in_step)]


@dataclass(frozen=True)
class EvaluationOrder:
    """Every sample once, in its own order: all in one step, number 0, of which each rank takes a contiguous share."""

    num_samples: int
    batch_size: int
    world_size: int
    seed: int = 0

    @property
    def most_batches(self) -> int:
        """Return how many batches the rank with the most has; others may have one less."""
        largest_share = -(-self.num_samples // self.world_size)
        return -(-largest_share // self.batch_size)

    def epoch(self, step: int) -> int:
        """Return 0: a sample is evaluated alike every time."""
        return 0

    def batches(self, step: int, rank: int, in_step: bool = False) -> list[Tensor]:
        """Return the samples, int64 `(n,)`, of each of a rank's batches; there are none after step 0."""
        if step > 0:
            return []
        return in_batches(contiguous_share(self.num_samples, rank, self.world_size), self.batch_size)


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
