"""A network that is slow, or becomes slow, is said once; noise, slow ranks and busy machines are something else."""

import random

import pytest

from hvdtrain.process.launch import Launch
from hvdtrain.trainer.lasting import INTERVALS
from hvdtrain.trainer.rank_figures import RankFigures
from hvdtrain.trainer.slow_network import NetworkJudge

STEPS, BYTES = 20, 8e6


def line(own, network_s, other=0.01):
    """Return the figures of ranks with these own parts, which all wait for the last and then for the network."""
    step = max(own) + network_s + other
    return [RankFigures(step, each, 0, each, 0, 8, 1e9, 0, step - each - other) for each in own]


def said(lines, num_bytes=BYTES):
    judge = NetworkJudge()
    found = [(number, text) for number, ranks in enumerate(lines) if (text := judge.add(ranks, STEPS, num_bytes))]
    return [(number, "slower" if "become slower" in text else "slow") for number, text in found]


def healthy(draw, network_s=0.03, size=4):
    """Return a line of a run whose network is uneven, as one that others use is."""
    return line([0.1 * (1 + 0.1 * abs(draw.gauss(0, 1))) for _ in range(size)], network_s * draw.uniform(0.6, 1.6))


@pytest.mark.parametrize("size", [2, 8, 64])
def test_20_healthy_runs_raise_no_alarm(size):
    for seed in range(20):
        draw = random.Random(seed)
        assert said([healthy(draw, size=size) for _ in range(200)], 4e6) == []


def test_a_network_that_becomes_slower_is_said_once():
    draw = random.Random(0)
    lines = [healthy(draw) for _ in range(60)] + [healthy(draw, 0.2) for _ in range(100)]
    ((number, what),) = said(lines)
    assert what == "slower"
    assert 60 + INTERVALS - 1 <= number <= 60 + 2 * INTERVALS


def test_one_that_is_slow_from_the_start_is_said_once():
    draw = random.Random(0)
    assert [what for _, what in said([healthy(draw, 0.4) for _ in range(100)])] == ["slow"]


def test_what_is_no_networks():
    draw = random.Random(1)
    quick = [healthy(draw) for _ in range(60)]
    # A rank that is slow: the others wait for it, and it waits for the network as before.
    assert said(quick + [line([0.1, 0.1, 0.1, 0.5], 0.03) for _ in range(60)]) == []
    # Machines that are busy with something else: all takes longer.
    assert said(quick + [line([0.4] * 4, 0.12) for _ in range(60)]) == []
    # A hiccup.
    assert said(quick + [healthy(draw, 0.3) for _ in range(INTERVALS - 1)] + quick) == []
    # Little that waits for rounds, not for bytes.
    assert said([line([0.001] * 4, 0.002, 0.0) for _ in range(3000)], 1e4) == []


def test_it_is_about_hosts(tmp_path):
    from test_components import Lines, job_of
    from thread_world import run_ranks

    from hvdtrain.rundir.directory import RunDirectory
    from hvdtrain.trainer import settle
    from hvdtrain.trainer.slow_network import SlowNetwork

    def work(world):
        alone = job_of(tmp_path / "run")
        job = settle(alone.task, alone.config, world, RunDirectory(tmp_path / "run"), Lines())
        found = []
        for local_size in (2, 1):
            world.launch = Launch("mpirun", rank=world.rank, size=2, local_rank=0, local_size=local_size)
            found.append(SlowNetwork.of(job) is not None)
        return found

    assert run_ranks(2, work) == [[False, True]] * 2
