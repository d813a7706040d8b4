"""Run `tests/ranks` inside real launches, once for each launcher and number of ranks."""

import re
import sys

import pytest
from conftest import LAUNCHERS, REPOSITORY


@pytest.mark.parametrize(
    ("launcher", "ranks"),
    [("horovodrun-mpi", 1), ("mpirun", 2), ("horovodrun-mpi", 4), ("horovodrun-gloo", 2)],
)
def test_inside(run, launcher, ranks):
    start = [word.format(n=ranks) for word in LAUNCHERS[launcher]]
    pytest_inside = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--color=no"]
    done = run(*start, *pytest_inside, REPOSITORY / "tests" / "ranks", cwd=REPOSITORY, timeout=400)
    assert done.code == 0, done.text[-8000:]
    assert len(re.findall(r"\d+ passed", done.text)) == ranks
