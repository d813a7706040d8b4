"""Horovod's own bfloat16, as the set-up brings it: added as fp32 in the order of the ranks, scaled, rounded once."""

import horovod.torch as hvd
import pytest
import torch

from hvdtrain.world.codecs import codec_of
from hvdtrain.world.horovod import HorovodWorld

pytestmark = pytest.mark.skipif(
    not hasattr(hvd.mpi_ops.mpi_lib, "horovod_torch_allreduce_async_torch_BFloat16Tensor"),
    reason="this Horovod was built before it knew bfloat16: launch/setup.sh builds it anew",
)
# What goes whole to all ranks, and what is cut into parts, of which the last ones are shorter.
COUNTS = [1, 5, 1030, 40_003]


def parts_of(world, count, low=0):
    """Return every rank's numbers."""
    seeds = [torch.Generator().manual_seed(10 * rank + count + low) for rank in range(world.size)]
    return [torch.randn(count, generator=seed).bfloat16() for seed in seeds]


def added(parts):
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total


@pytest.mark.parametrize("count", COUNTS)
def test_sums_and_means_are_rounded_once(world, count):
    parts = parts_of(world, count)
    mine = parts[world.rank]
    before = mine.clone()
    assert world.adds_bfloat16
    assert torch.equal(hvd.allreduce(mine, name=f"bf16.sum.{count}", op=hvd.Sum), added(parts).bfloat16())
    assert torch.equal(mine, before)
    mean = hvd.allreduce(mine, name=f"bf16.mean.{count}", op=hvd.Average)
    assert torch.equal(mean, (added(parts) * (1 / world.size)).bfloat16())
    scaled = hvd.allreduce(
        mine, name=f"bf16.scaled.{count}", op=hvd.Sum, prescale_factor=0.3, postscale_factor=1.7
    ).double()
    exact = 1.7 * 0.3 * sum(part.double() for part in parts)
    assert ((scaled - exact).abs() <= 2**-8 * exact.abs() + 1e-6).all()
    assert torch.equal(world.all_reduce(mine, "mean", f"bf16.world.{count}"), mean)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("op", ["Min", "Max", "Product"])
def test_other_reductions(world, count, op):
    parts = torch.stack(parts_of(world, count)).float()
    exact = {"Min": parts.amin, "Max": parts.amax, "Product": parts.prod}[op](0)
    result = hvd.allreduce(parts[world.rank].bfloat16(), name=f"bf16.{op}.{count}", op=getattr(hvd, op))
    assert torch.equal(result, exact.bfloat16())


def test_a_group_is_fused(world):
    groups = [parts_of(world, count) for count in (3, 4000, 17)]
    mine = [parts[world.rank] for parts in groups]
    for parts, result in zip(groups, hvd.grouped_allreduce(mine, name="bf16.group", op=hvd.Sum), strict=True):
        assert torch.equal(result, added(parts).bfloat16())


@pytest.mark.parametrize("rows", [1, 3, 5000])
def test_reduce_scatter(world, rows):
    """The first ranks have a row more than the others."""
    parts = [part.view(rows, 3) for part in parts_of(world, 3 * rows)]
    result = hvd.reducescatter(parts[world.rank], name=f"bf16.scatter.{rows}", op=hvd.Sum)
    mean = hvd.reducescatter(parts[world.rank], name=f"bf16.scatter.mean.{rows}", op=hvd.Average)
    own = added(parts).tensor_split(world.size)[world.rank]
    assert torch.equal(result, own.bfloat16())
    assert torch.equal(mean, (own * (1 / world.size)).bfloat16())


def test_what_only_moves_arrives_bit_by_bit(world):
    parts = parts_of(world, 4 * world.size)
    mine = parts[world.rank].clone()
    mine[0] = torch.nan
    gathered = hvd.allgather(mine, name="bf16.gather").view(world.size, -1)
    assert gathered[:, 0].isnan().all()
    assert torch.equal(gathered[:, 1:], torch.stack(parts)[:, 1:])
    sent = hvd.alltoall(parts[world.rank], name="bf16.all_to_all")
    sent = sent[0] if isinstance(sent, tuple) else sent
    assert torch.equal(sent, torch.cat([part.chunk(world.size)[world.rank] for part in parts]))
    assert torch.equal(hvd.broadcast(parts[world.rank], 0, name="bf16.broadcast"), parts[0])


def test_what_is_no_number_or_too_large(world):
    values = torch.tensor([torch.inf, torch.nan, 3e38, -torch.inf, 0.0, 1e-40]).bfloat16()
    total = hvd.allreduce(values, name="bf16.odd", op=hvd.Sum)
    mean = hvd.allreduce(values, name="bf16.odd.mean", op=hvd.Average)
    assert total[0] == torch.inf
    assert total[1].isnan()
    assert total[2] == (torch.inf if world.size > 1 else values[2])
    assert total[3] == -torch.inf
    assert total[4] == 0
    assert total[5] == (world.size * values[5].float()).bfloat16()
    assert mean[5] == values[5]


def test_fp32_gradients_are_the_bits_that_the_ranks_came_to_without_the_engine(world):
    class Released(HorovodWorld):
        adds_bfloat16 = False

    part = torch.randn(5003, generator=torch.Generator().manual_seed(world.rank)) / world.size
    codec = codec_of("bf16")
    own = codec.start(world, "bf16", "engine", part.clone())()
    before = Released.__new__(Released)
    vars(before).update(vars(world))
    assert torch.equal(own, codec.start(before, "bf16", "ranks", part.clone())())


def test_who_has_joined_adds_zeros(world):
    """Afterwards Horovod's names of what has no name differ between the ranks: so test_compat.py comes first."""
    if world.rank:
        total = hvd.allreduce(torch.ones(9).bfloat16(), name="bf16.joined", op=hvd.Sum)
        assert total.tolist() == [world.size - 1.0] * 9
    hvd.join()


def test_adasum_says_what_it_takes(world):
    if not hvd.mpi_enabled() or world.size & (world.size - 1):
        pytest.skip("Adasum is MPI's, for 2, 4, 8, ... ranks")
    with pytest.raises(Exception, match="Adasum does not take bfloat16: give it float16, float32 or float64"):
        hvd.allreduce(torch.ones(9).bfloat16(), name="bf16.adasum", op=hvd.Adasum)
