"""Run `tests/ranks` inside real launches, once for each launcher and number of ranks.

Two ranks under MPI run nearly all; four, and Gloo, what they add (marks `ranks` and `same_on_gloo`).
"""

import re
import sys

import pytest
from conftest import LAUNCHERS, REPOSITORY

RANKS = REPOSITORY / "tests" / "ranks"


@pytest.mark.parametrize(
    ("launcher", "ranks", "left_out"),
    [
        ("horovodrun-mpi", 1, ["-k", "not equals_one_process"]),  # it is one
        ("mpirun", 2, []),
        ("horovodrun-mpi", 4, []),
        ("horovodrun-gloo", 2, ["-m", "not same_on_gloo"]),
    ],
    ids=["horovodrun-mpi-1", "mpirun-2", "horovodrun-mpi-4", "horovodrun-gloo-2"],
)
def test_inside(run, launcher, ranks, left_out):
    start = [word.format(n=ranks) for word in LAUNCHERS[launcher]]
    pytest_inside = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--color=no"]
    pytest_inside.append("--capture=sys")  # the stacks of a test that hangs are to be seen
    done = run(*start, *pytest_inside, RANKS, *left_out, cwd=REPOSITORY, timeout=1200)
    assert done.code == 0, done.text[-8000:]
    assert len(re.findall(r"\d+ passed", done.text)) == ranks
