"""The kill campaign of `benchmarks/`, a short one."""

import sys

import pytest
from conftest import REPOSITORY

pytestmark = pytest.mark.alone


def test_killing_a_run_loses_nothing(run):
    campaign = REPOSITORY / "benchmarks" / "kill_campaign.py"
    done = run(sys.executable, campaign, "--kills", "1", "--launchers", "mpirun", "--seed", "3", timeout=240)
    assert done.code == 0, done.text
    assert "yes      yes" in done.out
