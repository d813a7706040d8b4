"""Loops as PyTorch users write them, on real ranks against one process in fp64: see `tests/support/loops.py`."""

import pytest
import users_loops  # noqa: F401  more of the table
from loops import LOOPS, Alone, Ranks, difference, tensors_of
from test_world import digest


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize("item", LOOPS, ids=lambda item: item.name)
def test_a_loop_of_the_table(world, item):
    alone = item.run(Alone())
    ours = item.run(Ranks(world))
    assert difference(ours, alone) < item.tolerance
    assert len(set(world.all_gather_object(digest(tensors_of(ours)), "loops.end"))) == 1
