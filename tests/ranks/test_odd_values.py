"""Values that ranks seldom give each other: each is carried as torch has it, or told on all ranks, and none hangs."""

import math

import numpy as np
import pytest
import torch

from hvdtrain.errors import UsageError


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_smallest_and_largest_are_nan_wherever_a_rank_has_nan(world, dtype):
    """By MPI's own it depends on which rank has it: ranks that decide by it would go different ways."""
    for rank in range(world.size):
        own = torch.tensor([math.nan if rank == world.rank else 1.0, -0.5 - world.rank], dtype=dtype)
        everyone = world.all_gather(own[None])
        for op in ("min", "max"):
            expected = everyone.amin(0) if op == "min" else everyone.amax(0)
            assert torch.equal(world.all_reduce(own, op), expected) or bool(expected[0].isnan())
            assert world.all_reduce(own, op)[0].isnan()
            assert world.all_reduce(own, op)[1] == expected[1]
            assert math.isnan(world.all_reduce(float(own[0]), op))


def test_evaluation_in_inference_mode(world):
    with torch.inference_mode():
        ones = torch.ones(world.size, 2)
        assert world.all_reduce(ones).sum() == ones.sum()
        assert world.all_reduce(2.5, "max") == 2.5
        assert torch.equal(world.broadcast(ones + world.rank), ones)
        assert len(world.all_gather(ones)) == world.size**2
        assert torch.equal(world.all_to_all(ones), ones)
        assert world.reduce_scatter(ones, "mean").sum() == 2
        assert world.broadcast_object({"loss": ones, "rank": world.rank})["loss"].sum() == ones.sum()
        assert world.all_gather_object(world.rank) == [*range(world.size)]
        assert len([*world.join(range(3))]) == 3
        own = torch.full((2,), float(world.rank))
        world.broadcast_tensors({"own": own}, "in_place")
        assert not own.any()
        world.barrier()
    assert world.agrees(1, "afterwards")


@pytest.mark.ranks(2, 3, 4)
def test_sums_that_their_type_does_not_hold(world):
    for dtype, value in [(torch.uint8, 200), (torch.int16, -20_000), (torch.int32, 2**31 - 1)]:
        with pytest.raises(UsageError, match=r"is more than torch\.u?int\d+ holds: give \.long\(\)"):
            world.all_reduce(torch.tensor([value], dtype=dtype), "sum")
        assert world.all_reduce(torch.tensor([1], dtype=dtype), "sum") == world.size
    with pytest.raises(UsageError, match=r"more than 64 bits over \d ranks: give float\(\)"):
        world.all_reduce(2**62, "sum")


def unequal(world):
    """Return calls in which ranks give different things, and what is said of each."""
    turned = torch.arange(6.0).view((2, 3) if world.rank else (3, 2))
    longer = torch.zeros(world.size * (1 + world.rank))
    return {
        "type": lambda: world.all_reduce(0 if world.rank else 3.5, "sum", "odd"),
        "op": lambda: world.all_reduce(torch.ones(2), "max" if world.rank else "sum", "odd"),
        "root": lambda: world.broadcast_object(1, "odd", root=world.rank and 1),
        "broadcast": lambda: world.broadcast(turned, "odd"),
        "gather": lambda: world.all_gather(turned[None], "odd"),
        "parts": lambda: world.all_to_all(longer, "odd"),
        "scatter": lambda: world.reduce_scatter(longer, "sum", "odd"),
    }


@pytest.mark.ranks(2, 3, 4)
@pytest.mark.parametrize("kind", ["type", "op", "root", "broadcast", "gather", "parts", "scatter"])
def test_what_differs_between_ranks_is_told_by_name(world, kind):
    with pytest.raises(UsageError, match=r"'odd(\.tensor)?' (is not alike on all ranks: Mismatched|has \[1, 2)"):
        unequal(world)[kind]()
    assert world.agrees(1, "afterwards")


@pytest.mark.ranks(2, 3, 4)
def test_objects_that_cannot_travel_are_told_on_all_ranks(world):
    """Where rank 0 raised alone, the others waited for it."""
    cannot = (value for value in [1])
    with pytest.raises(UsageError, match=r"'odd' cannot be sent by rank 0, as it does not pickle: .*generator"):
        world.broadcast_object(cannot if world.rank == 0 else None, "odd")
    with pytest.raises(UsageError, match=r"'odd' cannot be sent by rank 1, as it does not pickle: .*generator"):
        world.all_gather_object(cannot if world.rank == 1 else 1, "odd")
    with pytest.raises(UsageError, match=r"'odd' for rank 1 cannot be sent, as it does not pickle: .*generator"):
        world.scatter_object([1, *[cannot] * (world.size - 1)], "odd")
    with pytest.raises(UsageError, match=f"one value for each of the {world.size} ranks, not 1"):
        world.scatter_object([1], "odd")
    with pytest.raises(UsageError, match="not an object of type NoneType"):
        world.scatter_object(None, "odd")


def test_objects_arrive_as_they_are(world):
    weight = torch.zeros(3)
    given = {"sparse": torch.eye(2).to_sparse(), "weight": weight, "again": weight, "more": [weight[1:], torch.eye(2)]}
    received = world.broadcast_object(given if world.rank == 0 else None)
    received["weight"][0] = 1
    assert received["again"][0] == 1
    assert received["sparse"].is_sparse
    assert torch.equal(received["sparse"].to_dense(), torch.eye(2))
    assert torch.equal(received["more"][1], torch.eye(2))
    # What other ranks give does not count, also where all give a list.
    mine = world.scatter_object([(world.rank, rank) for rank in range(world.size)])
    assert mine == (0, world.rank)


def test_names_and_seeds(world):
    with pytest.raises(UsageError, match=r"a collective's name is a text, such as 'all_reduce\.loss', not 3"):
        world.all_reduce(1.0, "sum", 3)
    with pytest.raises(UsageError, match="a whole number as its seed, not 'a'"):
        world.sampler(8, seed="a")
    for epochs in range(3):
        seen = world.all_gather_object([*world.sampler(9, seed=np.int64(7 + epochs))])
        assert len({place for places in seen for place in places}) == 9 // world.size * world.size
