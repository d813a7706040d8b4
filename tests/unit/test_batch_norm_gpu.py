"""Synchronised batch normalisation as GPUs have it, held on the CPU against what CPUs do."""

import copy

import pytest
import torch
from thread_world import run_ranks
from torch import nn

from hvdtrain.world.batch_norm import SyncBatchNorm, _sums_in_fp64, _sums_of_moments


@pytest.mark.parametrize("number", [0, 5])
def test_the_sums_are_those_in_fp64(number):
    """Also where the mean is large against the spread."""
    x = 100 + torch.randn(number, 3, 4, generator=torch.Generator().manual_seed(0))
    dims, count = [0, 2], number * 4
    ours, exact = _sums_of_moments(x, dims, count), _sums_in_fp64(x, dims, count)
    torch.testing.assert_close(ours, exact, rtol=1e-6, atol=0)
    if number:
        variance = (ours[3:6] / count) - (ours[:3] / count).square()
        torch.testing.assert_close(variance, x.double().var((0, 2), correction=0), rtol=1e-2, atol=0)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_statistics_move_alike_without_a_look_at_the_count(momentum):
    def layers(world):
        first = SyncBatchNorm(nn.BatchNorm1d(3, momentum=momentum), world, "layer")
        return first, copy.deepcopy(first)

    ((seen, unseen),) = run_ranks(1, layers)
    generator = torch.Generator().manual_seed(0)
    for count in (4.0, 0.0, 1.0, 9.0):
        mean, variance = (torch.rand(3, generator=generator) for _ in range(2))
        if not count:
            mean, variance = mean * torch.nan, variance * torch.nan
        seen._track(mean, variance, count)
        unseen._track_unseen(mean, variance, torch.tensor(count, dtype=torch.float64))
    for ours, theirs in zip(unseen.buffers(), seen.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert unseen.num_batches_tracked == 3
