"""The table of loops on ranks that are threads; `tests/ranks/test_loops.py` runs it on real ones."""

import re
import threading
from pathlib import Path

import pytest
import users_loops  # noqa: F401  more of the table
from loops import LOOPS, Alone, Ranks, difference, table, tensors_of
from thread_world import run_ranks

PAGE = Path(__file__).parents[2] / "docs" / "own-loop.md"


@pytest.mark.parametrize("item", LOOPS, ids=lambda item: item.name)
def test_ranks_equal_one_process(item):
    alone = item.run(Alone())
    ranks = run_ranks(3, lambda world: item.run(Ranks(world)))  # tests/ranks has one, and two
    assert difference(ranks[0], alone) < item.tolerance
    for other in ranks[1:]:
        assert all((a == b).all() for a, b in zip(tensors_of(ranks[0]), tensors_of(other), strict=True))


class InManyBuckets(Ranks):
    """As models of more than a MiB travel: a part of the gradients while backward computes the rest."""

    def wrap(self, optimizer, model, **settings):
        return self.world.wrap(optimizer, model, **{"bucket_bytes": 1, **settings})


@pytest.mark.parametrize("item", LOOPS, ids=lambda item: item.name)
def test_ranks_equal_one_process_where_gradients_leave_one_by_one(item):
    alone = item.run(Alone())
    first, second = run_ranks(2, lambda world: item.run(InManyBuckets(world)))
    assert difference(first, alone) < item.tolerance
    assert all((a == b).all() for a, b in zip(tensors_of(first), tensors_of(second), strict=True))


def test_the_page_has_the_table():
    """To write it anew: `python -c "import loops, users_loops; print(loops.table())"` in tests/support."""
    assert PAGE.read_text().split("<!-- table")[1].split("-->\n")[1].strip() == table()


def test_the_pages_code_runs_on_one_process_and_on_several(monkeypatch, capsys):
    code = compile("\n\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)), str(PAGE), "exec")

    def work(world):
        names = {}
        monkeypatch.setattr("hvdtrain.init", lambda: world_of[threading.get_ident()])
        world_of[threading.get_ident()] = world
        exec(code, names)
        return [parameter.detach() for parameter in (*names["model"].parameters(), *names["generator"].parameters())]

    world_of = {}
    for first, second in [run_ranks(2, work), run_ranks(1, work) * 2]:
        assert all(a.isfinite().all() and a.equal(b) for a, b in zip(first, second, strict=True))
    assert "on 2 ranks" in capsys.readouterr().out
