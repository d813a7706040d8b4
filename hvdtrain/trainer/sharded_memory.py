"""What `--optim.shard` and `--optim.offload` leave on one rank, without allocating it: cut as training cuts it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from hvdtrain.trainer.job import Job
from hvdtrain.world import codec_for
from hvdtrain.world.offload import in_chunks
from hvdtrain.world.pieces import Cut, cut_for, numbers_in
from hvdtrain.world.sharded import division_of
from hvdtrain.world.sharded_buckets import IN_FLIGHT


@dataclass(frozen=True)
class Shares:
    """How an optimizer's parameters are cut between the ranks."""

    cuts: list[Cut]
    size: int
    wire_bytes: int
    """What the rank with the most holds of gradients besides those that backward writes: buckets on the wire, as they
    are sent and received, and its part of the mean."""

    def most_of(self, of_each: Mapping[nn.Parameter, int]) -> int:
        """Return the bytes of state on the rank with the most, from those of each whole parameter."""
        return max(round(sum(self._of_rank(rank, of_each))) for rank in range(self.size))

    def most_at_once(self, of_each: Mapping[nn.Parameter, int]) -> int:
        """Return the bytes of state that are on the device of any rank at once, where it lies in host memory."""
        sizes = {parameter: parameter.nbytes for parameter in of_each}
        ranks = range(self.size)
        return max(most_at_once(self._of_rank(rank, sizes), self._of_rank(rank, of_each)) for rank in ranks)

    def _of_rank(self, rank: int, of_each: Mapping[nn.Parameter, int]) -> list[float]:
        parts = [part for cut in self.cuts for part, _ in cut.parts(rank)]
        shares = [(part.parameter, (part.end - part.start) / numbers_in(part.parameter)) for part in parts]
        return [of_each.get(parameter, 0) * share for parameter, share in shares]


def most_at_once(sizes: Sequence[float], states: Sequence[float]) -> int:
    """Return the bytes of state that are brought from host memory at once, for parameters of these bytes."""
    chunks = in_chunks([round(size) for size in sizes])
    return max((round(sum(states[place] for place in chunk)) for chunk in chunks), default=0)


def sharded_shares(job: Job, optimizer: torch.optim.Optimizer, model: nn.Module) -> Shares:
    """Return how training would cut an optimizer over parameters of `model`, which may have no storage.

    Raises:
        ConfigError: it cannot be divided.
    """
    size, division = job.world.size, division_of(optimizer)
    ordered = [parameter for parameter in model.parameters() if parameter in division]
    cuts = cut_for(size, ordered, division, job.config.comm.bucket_mib << 20)
    codec = codec_for(job.config.comm)
    active = [cut for cut in cuts if any(parameter.requires_grad for parameter in cut.parameters)]
    buckets = sorted(codec.wire_bytes(sum(cut.lengths), cut.parameters[0].dtype) for cut in active)
    own = max(
        sum(codec.wire_bytes(cut.lengths[rank], cut.parameters[0].dtype) for cut in active) for rank in range(size)
    )
    return Shares(cuts, size, own + 2 * sum(buckets[-IN_FLIGHT - 1 :]))
