"""Which samples a step sees: a pure function of (seed, step) that does not depend on the number of ranks.

Global batch k of an epoch is a slice of the epoch's order (`samplers`); a rank takes its part of the slice. The last
slice of an epoch may be shorter, or be left out.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hvdtrain.data.dataset import contiguous_share, in_batches
from hvdtrain.data.draws import Draws, Request
from hvdtrain.data.samplers import Sampler, Shuffled, drawn_by
from hvdtrain.errors import ConfigError, counted
from hvdtrain.settings import BatchPlan

# A permutation costs numpy about as much for one small batch as for so many samples: it is computed for many steps.
_SAMPLES_AT_ONCE = 1 << 13

_Chunk = tuple[tuple[int, int], tuple[Tensor, ...]]
"""An epoch and the first of some steps in it, and the samples of each of these steps, int64 `(n,)`."""


@dataclass(frozen=True)
class SampleOrder:
    """The order in which training visits the samples.

    Raises:
        ConfigError: there are fewer samples than a global batch takes.
    """

    num_samples: int
    plan: BatchPlan
    seed: int
    sampler: Sampler = field(default_factory=Shuffled)
    """Which sample stands where in an epoch."""
    drop_last: bool = False
    """Leave out what is left of an epoch after its last full batch."""
    _chunks: tuple[_Chunk, ...] = field(default=(), init=False, repr=False, compare=False)
    """The two that were asked for last: whoever reads ahead is already in the next one."""

    def __post_init__(self) -> None:
        if self.num_samples < self.plan.global_batch_size:
            raise ConfigError(
                f"a global batch of {self.plan.global_batch_size} samples on"
                f" {counted(self.plan.world_size, 'rank')} needs at least as many, but the training data has"
                f" {self.num_samples}: use more data or a smaller --train.global-batch-size"
            )

    @functools.cached_property
    def steps_per_epoch(self) -> int:
        """The optimizer steps of one pass over the data, the shorter last one included."""
        full, rest = divmod(self.num_samples, self.plan.global_batch_size)
        return full + (rest > 0 and not self.drop_last)

    @property
    def samples_per_epoch(self) -> int:
        """Return how many samples one pass over the data sees."""
        return min(self.num_samples, self.steps_per_epoch * self.plan.global_batch_size)

    def samples_before(self, step: int) -> int:
        """Return how many samples `step` completed steps have seen, each as often as it was seen."""
        epoch, k = divmod(step, self.steps_per_epoch)
        return epoch * self.samples_per_epoch + k * self.plan.global_batch_size

    def epoch(self, step: int) -> int:
        """Return the number of the pass over the data, from 0, that the step after `step` completed ones is in."""
        return step // self.steps_per_epoch

    def global_batch(self, step: int) -> Tensor:
        """Return the samples, int64 `(n,)`, of the step that follows `step` completed ones, over all ranks.

        It is a part of a longer tensor, and not to be changed.
        """
        epoch, epoch_step = divmod(step, self.steps_per_epoch)
        number = epoch_step % self._steps_at_once
        return self._batches(epoch, epoch_step - number)[number]

    @functools.cached_property
    def _steps_at_once(self) -> int:
        return max(1, _SAMPLES_AT_ONCE // self.plan.global_batch_size)

    def _batches(self, epoch: int, first: int) -> tuple[Tensor, ...]:
        """Return the samples, int64 `(n,)`, of each of some steps of an epoch, `first` and those that follow it."""
        for place, found in self._chunks:
            if place == (epoch, first):
                return found
        positions = self._positions(first, self._steps_at_once)
        samples = torch.from_numpy(drawn_by(self.sampler, positions, self.num_samples, self.seed, epoch))
        batches: tuple[Tensor, ...] = torch.split(samples, self.plan.global_batch_size)
        # Frozen for whoever has an order; one tuple, replaced as a whole, for whichever thread looks.
        object.__setattr__(self, "_chunks", (((epoch, first), batches), *self._chunks[:1]))
        return batches

    def _positions(self, first: int, steps: int = 1) -> NDArray[np.int64]:
        """Return where the samples of so many steps of an epoch, `first` and those that follow it, stand in it."""
        batch = self.plan.global_batch_size
        return np.arange(first * batch, min((first + steps) * batch, self.num_samples))

    def micro_batches(self, step: int, rank: int, in_step: bool = False) -> list[Tensor]:
        """Return the positions in `global_batch(step)`, int64 `(n,)`, of each of a rank's micro-batches.

        In a short batch there are perhaps fewer than usual, or none; with `in_step`, empty ones take their place up to
        as many as the rank with the most has.
        """
        epoch_step = step % self.steps_per_epoch
        num_samples = min(self.plan.global_batch_size, self.num_samples - epoch_step * self.plan.global_batch_size)
        return [*_micro_batches(num_samples, rank, self.plan.world_size, self.plan.micro_batch_size, in_step)]

    def requests(self, step: int, rank: int, in_step: bool = False) -> list[Request]:
        """Return a rank's micro-batches, as `micro_batches` cuts the step."""
        samples, epoch = self.global_batch(step), self.epoch(step)
        parts = [_part(samples, positions) for positions in self.micro_batches(step, rank, in_step)]
        keys = parts
        if getattr(self.sampler, "repeats", False):
            places = torch.from_numpy(self._positions(step % self.steps_per_epoch))
            keys = [places[positions] for positions in self.micro_batches(step, rank, in_step)]
        return [Request(part, Draws(self.seed, epoch, of_part)) for part, of_part in zip(parts, keys, strict=True)]


def _part(samples: Tensor, positions: Tensor) -> Tensor:
    """Return the samples at these positions, which are all or some of them, in order."""
    return samples if positions.shape == samples.shape else samples.index_select(0, positions)


@functools.lru_cache(maxsize=64)
def _micro_batches(num_samples: int, rank: int, size: int, micro_batch_size: int, in_step: bool) -> tuple[Tensor, ...]:
    """Return a rank's micro-batches of a step of so many samples, as `SampleOrder.micro_batches`: nearly all alike."""
    share = contiguous_share(num_samples, rank, size)
    batches = in_batches(share, micro_batch_size)
    if in_step:
        largest_share = -(-num_samples // size)
        most = -(-largest_share // micro_batch_size)
        batches += [share[:0]] * (most - len(batches))
    return tuple(batches)


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

    def requests(self, step: int, rank: int, in_step: bool = False) -> list[Request]:
        """Return a rank's batches; a sample is evaluated alike every time. There are none after step 0."""
        if step > 0:
            return []
        share = contiguous_share(self.num_samples, rank, self.world_size)
        return [Request(samples, Draws(self.seed, 0, samples)) for samples in in_batches(share, self.batch_size)]
