"""All that torch documents of training loops: each name runs on one process and on ranks alike, or has its reason."""

import pytest
import torch_autograd  # noqa: F401  fills the table
import torch_modules  # noqa: F401
from loops import LOOPS, Alone, Ranks, difference, tensors_of
from thread_world import run_ranks
from torch_calls import PROOFS, TOLERANCES
from torch_names import IN_THE_TABLE, REASONS, all_names

_BY_LOOP = {run: name for name, run in reversed(PROOFS.items())}


def test_every_name_is_run_or_has_its_reason():
    """A name that a newer torch adds fails here: write a loop with it, or say why it needs none."""
    assert sorted(all_names() - {*PROOFS, *IN_THE_TABLE, *REASONS}) == []


def test_no_name_is_in_two_lists_and_each_loop_is_there():
    assert not {*PROOFS} & {*REASONS}
    assert not {*IN_THE_TABLE} & {*REASONS}
    assert {*IN_THE_TABLE.values()} <= {loop.name for loop in LOOPS}


@pytest.mark.parametrize("run", _BY_LOOP, ids=_BY_LOOP.get)
def test_ranks_equal_one_process(run):
    alone = run(Alone())
    ranks = run_ranks(2, lambda world: run(Ranks(world)))
    assert difference(ranks[0], alone) < TOLERANCES[run]
    assert all(a.equal(b) for a, b in zip(tensors_of(ranks[0]), tensors_of(ranks[1]), strict=True))
