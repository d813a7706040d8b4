"""Run `tests/ranks` inside real launches, once for each launcher and number of ranks."""

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
        # Its planted bugs and its many healthy recipes are the same under Gloo; test_verify_verb.py starts it there.
        ("horovodrun-gloo", 2, ["--ignore", RANKS / "test_verify.py"]),
    ],
    ids=["horovodrun-mpi-1", "mpirun-2", "horovodrun-mpi-4", "horovodrun-gloo-2"],
)
def test_inside(run, launcher, ranks, left_out):
    start = [word.format(n=ranks) for word in LAUNCHERS[launcher]]
    pytest_inside = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--color=no"]
    done = run(*start, *pytest_inside, RANKS, *left_out, cwd=REPOSITORY, timeout=400)
    assert done.code == 0, done.text[-8000:]
    assert len(re.findall(r"\d+ passed", done.text)) == ranks
