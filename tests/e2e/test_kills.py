"""The kill campaign of `benchmarks/`, a short one.

launch/test.sh -m campaign tests/e2e/test_kills.py        a minute or two
"""

import sys

import pytest
from conftest import REPOSITORY

pytestmark = [pytest.mark.campaign, pytest.mark.alone]


def test_killing_a_run_loses_nothing(run, request):
    if "campaign" not in request.config.getoption("-m"):
        pytest.skip("kills a run again and again: ask for it with -m campaign")
    campaign = REPOSITORY / "benchmarks" / "kill_campaign.py"
    done = run(sys.executable, campaign, "--kills", "4", "--runs", "mpirun", "full-disk", "--seed", "3", timeout=600)
    assert done.code == 0, done.text
    assert done.out.count("yes      yes") == 2
