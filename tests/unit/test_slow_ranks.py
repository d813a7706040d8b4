"""Slow ranks and hosts: planted ones are named once, with their cause; others are not."""

import math
import random
import re
import statistics
from functools import partial

import pytest
import torch
from test_components import Lines, job_of
from thread_world import run_ranks

from hvdtrain.process.usage import HostCounts, host_counts, involuntary_switches, most_bytes
from hvdtrain.rundir.directory import RunDirectory
from hvdtrain.trainer import settle
from hvdtrain.trainer.lasting import TRIES
from hvdtrain.trainer.line import step_metrics
from hvdtrain.trainer.rank_figures import RankFigures, metrics_of, start_sums_and_figures
from hvdtrain.trainer.slow_ranks import Host, Medians, SlowJudge, SlowRanks, cause_of, sentences
from hvdtrain.trainer.state import start_training
from hvdtrain.trainer.step import train_step
from hvdtrain.trainer.stopwatch import Lap, Stopwatch, counts_of

FACTOR, STEPS = 1.3, 25  # steps of a line, about 0.1 s each


def figures(own_s, step_s, samples=8.0, data_s=0.0, cpu_s=None, switches=0.01):
    return RankFigures(step_s, own_s, data_s, own_s if cpu_s is None else cpu_s, switches, samples, 1e9, 0)


def line(own, samples=None):
    """Return the figures of ranks that take these seconds for themselves, and all wait for the slowest."""
    samples = samples or [8.0] * len(own)
    return [figures(own_s, max(own) + 0.01, count) for own_s, count in zip(own, samples, strict=True)]


def named(lines):
    """Return the ranks that are named, with the number of the line."""
    judge = SlowJudge(FACTOR)
    return [(number, slow.rank) for number, ranks in enumerate(lines) for slow in judge.add(ranks, STEPS)]


def noisy(draw, size, spread=0.1, hiccups=0.2):
    """Return own times of healthy ranks, with noise; now and then one of them hiccups."""
    own = [0.1 * (1 + spread * abs(draw.gauss(0, 1))) for _ in range(size)]
    if draw.random() < hiccups:
        own[draw.randrange(size)] *= 3
    return own


@pytest.mark.parametrize("size", [2, 3, 8, 64])
def test_20_healthy_runs_raise_no_alarm(size):
    for seed in range(20):
        draw = random.Random(seed)
        offsets = [1 + 0.05 * draw.random() for _ in range(size)]
        lines = [
            line([a * b for a, b in zip(noisy(draw, size), offsets, strict=True)])
            for _ in range(60 if size > 8 else 200)
        ]
        assert named(lines) == []


@pytest.mark.parametrize("size", [2, 3, 8, 64])
def test_a_slow_rank_is_named_once(size):
    draw = random.Random(0)
    lines = [noisy(draw, size, 0.05, 0) for _ in range(200)]
    for own in lines[100:]:
        own[1] = 0.2 + 0.02 * draw.random()
    found = named([line(own) for own in lines])
    assert [rank for _, rank in found] == [1]
    # Longer after a long healthy time, and of more ranks: chance has had more tries.
    needed = 5 + math.floor(math.log2(100 * size / TRIES))
    assert 100 + needed - 2 <= found[0][0] <= 100 + needed


def test_a_hiccup_is_forgiven():
    lines = [line([0.1, 0.3 if number % 3 else 0.1]) for number in range(100)]
    assert named(lines) == []


def test_short_lines_are_put_together():
    """Noise of single steps is no alarm: the figures of 2 s count together."""
    judge, draw = SlowJudge(FACTOR), random.Random(0)
    for _ in range(5000):
        own = [0.001 * (1 + draw.expovariate(1)) for _ in range(2)]
        assert judge.add(line(own), 1) == []


def test_a_rank_with_more_samples_has_more_to_do():
    assert named([line([0.15, 0.1], [3.0, 2.0])] * 50) == []
    assert [rank for _, rank in named([line([0.3, 0.1], [3.0, 2.0])] * 50)] == [0]


def test_what_nobody_waits_for_is_not_slow():
    """Where a step is mostly communication, twice as much of little is no matter."""
    assert named([[figures(0.004, 0.1), figures(0.002, 0.1)]] * 50) == []


def of(rank, *ranks):
    """Return the slow one of these ranks."""
    judge = SlowJudge(FACTOR)
    return next(slow for _ in range(50) for slow in judge.add(ranks, STEPS) if slow.rank == rank)


QUIET = Host("a", HostCounts(1000, 0, 0))


@pytest.mark.parametrize(
    ("slow", "host", "expected"),
    [
        (figures(0.3, 0.3, data_s=0.2), QUIET, "it waits for data, 0.2 s of a step, the others 0 s"),
        (figures(0.3, 0.3), QUIET, "it computes for longer, on a processor of its own"),
        (figures(0.3, 0.3), Host("a", HostCounts(1000, 0, 12)), "heat: .* 12 times"),
        (figures(0.3, 0.3, cpu_s=0.1), Host("a", HostCounts(1000, 400)), "^other virtual machines .* 40%"),
        (figures(0.3, 0.3, cpu_s=0.1), Host("a", HostCounts(1000, 60)), "^it computes .* sleeps .*; besides, .* 6%"),
        (figures(0.3, 0.3, cpu_s=0.12, switches=60.0), QUIET, "shares its core: 200 times a second"),
        (figures(0.3, 0.3, cpu_s=0.1), QUIET, "computes for 0.1 s of a step only and sleeps"),
        (figures(0.3, 0.3, cpu_s=0.1), Host("a", HostCounts(1000), is_gpu=True), "its GPU computes for longer"),
    ],
)
def test_the_cause_is_named(slow, host, expected):
    others = [figures(0.1, 0.3)] * 3
    found = of(0, slow, *others)
    assert found.factor == pytest.approx(3)
    assert re.search(expected, cause_of(found, [host, *[Host("b", HostCounts(1000))] * 3]))


def test_a_host_that_is_slow_as_a_whole_is_named_as_one():
    judge = SlowJudge(FACTOR)
    ranks = [figures(0.2 if rank in (2, 3) else 0.1, 0.2) for rank in range(6)]
    found = next(found for _ in range(50) if (found := judge.add(ranks, STEPS)))
    hosts = [Host(f"node{rank // 2}", HostCounts(1000)) for rank in range(6)]
    (said,) = sentences(found, hosts, 400)
    assert said.startswith("WARNING: step 400: host node1, all its 2 ranks, is slow, and all others wait")
    assert "2.00 times the others'" in said
    one_host = sentences(found, [Host("node0", HostCounts(1000))] * 6, 400)
    assert [said.split(" is slow")[0] for said in one_host] == [
        "WARNING: step 400: rank 2 on node0",
        "WARNING: step 400: rank 3 on node0",
    ]


def test_figures_travel_with_the_sums_to_the_last_bit():
    def work(world):
        own = RankFigures(*(world.rank + 1 / (3 + place) for place in range(len(RankFigures._fields))))
        sums = torch.tensor([0.1 * (world.rank + 1), 7.0], dtype=torch.float64)
        return start_sums_and_figures(world, sums, own)(), own, world.sent

    results = run_ranks(3, work)
    for (sums, ranks), _, sent in results:
        assert sums == [pytest.approx(0.6), 21.0]
        assert ranks == [own for _, own, _ in results]
        assert sent == ["train.metrics"]


def test_a_line_tells_where_the_time_has_gone():
    lap = Lap(0.5, {"data": 0.1, "compute": 0.2, "communication": 0.05, "optimizer": 0.02})
    assert sum(lap.split.values()) == pytest.approx(0.5)
    assert lap.split["other"] == pytest.approx(0.13)
    metrics = metrics_of(lap, line([0.32, 0.2, 0.21]))
    assert metrics["time/slowest_rank"] == 0
    assert metrics["time/own_median_s"] == 0.21
    assert metrics["time/own_s/rank-002"] == 0.21
    assert metrics["memory/host_bytes"] == 1e9
    assert "memory/device_bytes" not in metrics
    assert not [name for name in metrics_of(lap, line([0.1] * 65)) if "rank-" in name]


def test_the_parts_of_a_timed_gpu_never_exceed_the_step():
    split = Lap(0.1, {"data": 0.05, "compute": 0.15}).split
    assert sum(split.values()) == pytest.approx(0.1)
    assert split["compute"] == pytest.approx(3 * split["data"])


def test_ranks_log_the_split_and_bytes(tmp_path):
    """Ranks that are threads: all of them say the same of one another, by no collective more than there was."""

    def work(world):
        alone = job_of(tmp_path / "run")
        job = settle(alone.task, alone.config, world, RunDirectory(tmp_path / "run"), Lines())
        training = start_training(job)
        assert training.component(SlowRanks) is not None
        watch = Stopwatch(0, partial(counts_of, world))
        train_step(job, training)
        before = list(world.sent)
        metrics = step_metrics(job, training, watch)
        return metrics, world.sent[len(before) :]

    (one, sent), (other, _) = run_ranks(2, work)
    assert sent == ["train.metrics"]
    ranks = [name for name in one if name.startswith("time/own_s/")]
    assert ranks == ["time/own_s/rank-000", "time/own_s/rank-001"]
    assert [one[name] for name in ranks] == [other[name] for name in ranks]
    parts = [one[f"time/{part}_s"] for part in ("data", "compute", "communication", "optimizer", "other")]
    assert sum(parts) == pytest.approx(one["time/step_s"])
    assert min(parts) >= 0
    assert one["comm/bytes_per_step"] > 4 * 8 * 5  # the gradients, and what they carry


def test_medians_without_one():
    draw = random.Random(0)
    for size in range(2, 12):
        values = [draw.choice((0.0, 1.5, draw.random())) for _ in range(size)]
        medians = Medians(values)
        for place, value in enumerate(values):
            assert medians.without(value) == pytest.approx(statistics.median(values[:place] + values[place + 1 :]))


def test_what_is_counted_counts():
    first = host_counts()
    end = torch.randn(200, 200)
    for _ in range(200):
        end = (end @ end).tanh()
    since = host_counts().since(first)
    assert since.ticks >= 0
    assert min(since) >= 0
    assert most_bytes() > 1 << 24
    assert involuntary_switches() >= 0
