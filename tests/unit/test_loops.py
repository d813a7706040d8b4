"""The table of loops on ranks that are threads; `tests/ranks/test_loops.py` runs it on real ones."""

import pytest
from loops import LOOPS, Alone, Ranks, difference, tensors_of
from thread_world import run_ranks


@pytest.mark.parametrize("item", LOOPS, ids=lambda item: item.name)
def test_ranks_equal_one_process(item):
    alone = item.run(Alone())
    ranks = run_ranks(2, lambda world: item.run(Ranks(world)))
    assert difference(ranks[0], alone) < item.tolerance
    assert all((a == b).all() for a, b in zip(tensors_of(ranks[0]), tensors_of(ranks[1]), strict=True))
