"""The plan's models against problems whose answer is known."""

import json
import math
import random
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
import thread_world
import torch

from hvdtrain.errors import ConfigError
from hvdtrain.optim.noise import NoiseScale, Norms, agreement, noise_of_training, noise_scale, steps_ratio
from hvdtrain.recipes import load_recipe
from hvdtrain.rundir.manifest import Manifest, encode_manifest
from hvdtrain.settings.compression import EXACT
from hvdtrain.verbs.options import PlanOptions
from hvdtrain.verbs.plan import comparison, costs, plan
from hvdtrain.verbs.plan.all_reduce import groups_of, sizes_for
from hvdtrain.verbs.plan.answer import answer, worker_counts
from hvdtrain.verbs.plan.calibrate import calibrated
from hvdtrain.verbs.plan.facts import Facts, compute_on, predict
from hvdtrain.verbs.plan.gather import _refused
from hvdtrain.verbs.plan.limits import difference
from hvdtrain.verbs.plan.local import cut, local_step_time
from hvdtrain.verbs.plan.logged import find_noise, noise_of_run
from hvdtrain.verbs.plan.methods import Format, Method, handed_bytes, methods_of, sends_of
from hvdtrain.verbs.plan.network import Layout, Network, Pace, Timing, fit, other_network, paced
from hvdtrain.verbs.plan.page import save_html
from hvdtrain.verbs.plan.report import describe, table
from hvdtrain.verbs.plan.saved import load_json, save_json
from hvdtrain.verbs.plan.step import Bucket, Compute, Send, exposed_communication, step_time, travelling
from hvdtrain.world import Cargo, begin_exchange, codec_of

GIGABIT = Network("gloo", 1e-3, None, None, 50e-6, 8 / 1e9, 0.05, 4)
SIZES = (4 << 10, 64 << 10, 1 << 20, 16 << 20)


@pytest.mark.parametrize("controller", ["mpi", "gloo"])
def test_a_network_is_recovered_from_its_timings(controller):
    true = Network(controller, 2e-4, 5e-6, 1e-10, 1e-4, 8e-9, 0.0, 8)
    layouts = [Layout(2, 1), Layout(4, 1), Layout(8, 2), Layout(2, 2)]
    draws = random.Random(0)
    exact = [Timing(layout, size, true.seconds(size, layout)) for layout in layouts for size in SIZES]
    found = fit(controller, exact)
    for layout in (Layout(16, 4), Layout(64, 16)):
        for size in SIZES:
            assert found.seconds(size, layout) == pytest.approx(true.seconds(size, layout), rel=1e-6)
    assert found.error < 1e-6
    # From two hosts alone: what one rank takes by itself is no latency of the network.
    few = [Timing(Layout(1, 1), 4096, true.overhead_s)]
    few += [Timing(Layout(2, 2), size, true.seconds(size, Layout(2, 2))) for size in SIZES]
    assert fit(controller, few).seconds(4096, Layout(16, 16)) == pytest.approx(true.seconds(4096, Layout(16, 16)))
    noisy = [Timing(t.layout, t.num_bytes, t.seconds * draws.uniform(0.95, 1.05)) for t in exact]
    found = fit(controller, noisy)
    assert found.seconds(16 << 20, Layout(64, 16)) == pytest.approx(true.seconds(16 << 20, Layout(64, 16)), rel=0.1)
    assert 0.01 < found.error < 0.05


def test_what_groups_wait_for_idle_ranks_is_no_networks():
    true = Network("mpi", 2e-5, 5e-6, 1e-10, None, None, 0.0, 4)
    idle = 8e-4
    timings = [Timing(Layout(1, 1), 4096, true.overhead_s + idle, is_part=True)]
    timings += [Timing(Layout(2, 1), size, true.seconds(size, Layout(2, 1)) + idle, is_part=True) for size in SIZES]
    timings += [Timing(Layout(4, 1), size, true.seconds(size, Layout(4, 1))) for size in SIZES]
    found = fit("mpi", timings)
    for layout in (Layout(2, 1), Layout(4, 1), Layout(16, 1)):
        assert found.seconds(4096, layout) == pytest.approx(true.seconds(4096, layout), rel=1e-6)
    # Of one rank alone and the world of two: an overhead where it explains both, as with Horovod as it was released.
    stock = Network("mpi", 1e-3, 5e-6, 1e-10, None, None, 0.0, 2)
    timings = [Timing(Layout(1, 1), 4096, stock.overhead_s, is_part=True)]
    timings += [Timing(Layout(2, 1), size, stock.seconds(size, Layout(2, 1))) for size in SIZES]
    assert fit("mpi", timings).seconds(4096, Layout(64, 1)) == pytest.approx(stock.seconds(4096, Layout(64, 1)))


def test_nothing_that_is_fitted_is_negative():
    # Larger messages that are faster, as on a machine that was busy at first.
    timings = [Timing(Layout(2, 1), size, 1e-3 / (1 + i)) for i, size in enumerate(SIZES)]
    found = fit("mpi", timings)
    assert min(found.overhead_s, found.inside_latency_s, found.inside_byte_s) >= 0
    assert found.outside_byte_s is None
    assert not found.covers(Layout(4, 2))
    with pytest.raises(ValueError, match="no all-reduce"):
        fit("mpi", [])


def test_a_network_that_one_does_not_have():
    other = other_network(GIGABIT, "25gbit,5us")
    assert other.outside_latency_s == pytest.approx(5e-6)
    assert 1 / other.outside_byte_s == pytest.approx(25e9 / 8 * 0.957)
    for wrong in ("25gbit", "fast,5us", "0gbit,1us", "1gbit,5s", ".gbit,1us", "1.2.3gbit,1us", "1gbit,.us"):
        with pytest.raises(ConfigError, match="--link"):
            other_network(None, wrong)


def test_communication_hides_behind_what_is_left_of_backward():
    compute = Compute(1.0, 2.0, 0.1)
    assert exposed_communication(compute, [Send(0.25, 1.0, 0.5)]) == 0
    assert exposed_communication(compute, [Send(0.25, 1.0, 0.5), Send(1.0, 1.0, 0.5)]) == 1.5
    assert exposed_communication(compute, [Send(0.25, 0, 3.0), Send(1.0, 0, 3.0)]) == pytest.approx(0.5 + 3 + 3 - 2)


def test_a_step():
    compute, buckets = Compute(0.1, 0.2, 0.01), [Bucket(0.5, 1 << 20), Bucket(1.0, 1 << 20)]
    alone = step_time(compute, [], accum_steps=3)
    assert alone.total_s == pytest.approx(0.31 + 2 * 0.3)
    assert alone.exposed_s == 0
    one = GIGABIT.seconds(1 << 20, Layout(4, 4))
    sends = sends_of(buckets, "none", 1024, Layout(4, 4), (GIGABIT, None))
    step = step_time(compute, sends)
    assert step.exposed_s == pytest.approx(one)
    assert step.latency_s + step.bandwidth_s == pytest.approx(step.exposed_s)
    assert step_time(compute, sends, codec_s=0.5).total_s == pytest.approx(step.total_s + 0.5)
    slowed = step_time(compute, sends, interference=1.0)
    assert slowed.exposed_s == pytest.approx(2 * one)


def test_a_step_of_local_updates():
    compute, sends = Compute(0.1, 0.2, 0.01), [Send(1.0, 0.5, 1.5), Send(1.0, 0.5, 1.5)]
    step = local_step_time(compute, [sends], 10, question_s=0.2, codec_s=1.0)
    assert step.total_s == pytest.approx(0.31 + 0.4 + 0.1)  # the question hides behind the step
    assert (step.exposed_s, step.latency_s) == (pytest.approx(0.4), pytest.approx(0.1))
    # One that takes longer is asked every third step, as within a second there are three.
    assert local_step_time(compute, [sends], 10, question_s=0.9, codec_s=1.0).total_s == pytest.approx(0.81)
    assert local_step_time(compute, [sends], 10, question_s=1.5, codec_s=1.0).total_s == pytest.approx(0.81 + 0.19)


def test_fragments_that_arrive_late_hide_behind_steps():
    """A period of 10 steps of 1 s; two fragments of 2 s each."""
    compute, one = Compute(0.3, 0.6, 0.1), [Send(1.0, 0.5, 1.5)]

    def seconds(overlap_steps, parts=(one, one), **more):
        return local_step_time(compute, parts, 10, 0.0, overlap_steps=overlap_steps, **more).total_s

    assert seconds(0) == pytest.approx(1.4)
    assert seconds(1) == pytest.approx(1.2)  # each hides behind one step
    assert seconds(2) == pytest.approx(1.0)
    assert seconds(2, interference=0.5) == pytest.approx(1.2)  # half of what is hidden slows computing down
    assert seconds(4, [[Send(1.0, 0.0, 2.0), Send(1.0, 0.0, 3.0, follows=True)]]) == pytest.approx(1.3)
    # A link carries no more than there is time for: 16 s of messages in a period of 10.
    assert seconds(4, [one * 2] * 4) == pytest.approx(1.6)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_fragments_of_buckets_hold_what_there_was(count):
    buckets = [Bucket(0.5, 64, ((4, 4),), exact=(0,), exact_for=("powersgd",)), Bucket(1.0, 96, ((2, 8), (8,)))]
    fragments = cut(buckets, count)
    assert len(fragments) == count
    assert sorted(shape for own in fragments for bucket in own for shape in bucket.shapes) == [(2, 8), (4, 4), (8,)]
    assert sum(bucket.num_bytes for own in fragments for bucket in own) == 160
    of_exact = [bucket.shapes[place] for own in fragments for bucket in own for place in bucket.exact]
    assert of_exact == [(4, 4)]
    unknown = [Bucket(1.0, 100)]
    assert sum(bucket.num_bytes for own in cut(unknown, count) for bucket in own) == pytest.approx(100, abs=count)


@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("compression", ["none", "fp16", "bf16", "int8", "powersgd:2", "topk:0.1"])
def test_planned_bytes_are_those_that_ranks_hand_over(compression, size):
    """For any number of ranks, by the codec itself, against a world whose ranks are threads."""
    shapes = ((64, 48), (33,), (300, 5))
    cargo = Cargo(tuple(map(torch.Size, shapes)), torch.float32)
    options = {} if compression in EXACT else {"min_size": 100}

    def work(world):
        codec = codec_of(compression, **options)
        begin_exchange(world, codec, "plan", [cargo], [cargo.buffer(codec, world)])()
        return world.handed_bytes["plan"]

    said = handed_bytes([Bucket(1.0, 0, shapes)], compression, 100, size)
    assert set(thread_world.run_ranks(size, work)) == {said}


@pytest.mark.parametrize("compression", ["none", "fp16", "bf16", "int8", "powersgd:2", "topk:0.1"])
def test_a_million_ranks_are_planned_for_in_no_time(compression):
    """Nothing is gone through rank by rank: there are no numbers to add."""
    began = time.process_time()
    said = handed_bytes([Bucket(1.0, 0, ((640, 480), (33,)))], compression, 100, 10**6)
    assert said > 0
    assert time.process_time() - began < 2


def test_parts_of_a_bucket_travel_together_in_formats_that_gain_nothing_by_parts():
    parts = [Bucket(0.2, 8, ((2,),), exact=(0,), exact_for=("powersgd",), whole=0), Bucket(0.5, 16, ((4,),), whole=0)]
    parts += [Bucket(1.0, 12, ((3,),), whole=1)]
    assert travelling(parts, "fp16") == parts
    for compression in ("powersgd:4", "topk:0.01", "int8"):
        first, second = travelling(parts, compression)
        assert (first.ready, first.num_bytes, first.shapes, first.exact) == (0.5, 24, ((2,), (4,)), (0,))
        assert second == parts[2]
    unknown = [replace(part, whole=None) for part in parts]  # as in a plan.json of before
    assert travelling(unknown, "int8") == unknown


def test_gathered_bytes_grow_with_the_planned_ranks():
    """Top-k's numbers go to all ranks: what a link carries grows with them, unlike an all-reduce's."""
    bucket = Bucket(1.0, 4 << 20, ((1024, 1024),))
    fast = Network("gloo", 0.0, None, None, 0.0, 8 / 1e9, 0.0, 2)

    def seconds(compression, n):
        return sum(send.seconds for send in sends_of([bucket], compression, 1024, Layout(n, n), (fast, None)))

    assert seconds("topk:0.01", 64) == pytest.approx(63 * seconds("topk:0.01", 2), rel=1e-3)
    assert seconds("none", 64) < 2 * seconds("none", 2)
    assert seconds("int8", 64) < 4 * seconds("int8", 2)


def test_mpi_folds_what_is_no_power_of_two():
    """Two more times all bytes over the slowest link; Gloo's ring does not care."""
    mpi, gloo = (Network(kind, 0.0, None, None, 0.0, 1e-9, 0.0, 2) for kind in ("mpi", "gloo"))
    assert mpi.seconds(1e9, Layout(6, 6)) == pytest.approx(2 * 3 / 4 + 2)
    assert mpi.seconds(1e9, Layout(4, 4)) == pytest.approx(2 * 3 / 4)
    assert gloo.seconds(1e9, Layout(6, 6)) == pytest.approx(2 * 5 / 6)
    wide = [answer(facts(network=replace(GIGABIT, controller="mpi")), n).rows[-1].error for n in (4, 6, 8)]
    assert wide[1] > wide[0]
    assert wide[1] > wide[2]


def test_another_collectives_pace():
    true = replace(GIGABIT, paces={"all_gather": Pace(3.0, 1.5)})
    layout = Layout(4, 4)
    timings = [Timing(layout, size, true.seconds(size, layout, "all_gather")) for size in (4096, 1 << 20)]
    found = paced(GIGABIT, "all_gather", timings)
    assert found.seconds(1 << 22, Layout(16, 16), "all_gather") == pytest.approx(
        true.seconds(1 << 22, Layout(16, 16), "all_gather")
    )
    assert found.seconds(1 << 22, layout) == GIGABIT.seconds(1 << 22, layout)


def test_the_noise_scale_of_a_linear_regression_with_known_covariance():
    """For y = x w + e, x ~ N(0, I): |G|^2 and tr(S) at w = 0 follow from w* and the variance of e."""
    d, b, workers, sigma = 10, 8, 4, 2.0
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(d, generator=generator, dtype=torch.float64)
    # Gradient of a sample at w = 0: -2 y x. G = -2 w. E|g|^2 = 4 E[y^2 x^2] = 4 ((d + 2) |w|^2 + d sigma^2).
    signal = 4 * float(w @ w)
    variance = 4 * ((d + 2) * float(w @ w) + d * sigma**2) - signal
    norms = []
    for _ in range(4000):
        x = torch.randn(workers, b, d, generator=generator, dtype=torch.float64)
        y = x @ w + sigma * torch.randn(workers, b, generator=generator, dtype=torch.float64)
        gradients = (-2 * y[..., None] * x).mean(1)
        small, large = gradients.square().sum(1).mean(), gradients.mean(0).square().sum()
        norms.append(Norms(float(small), float(large)))
    found = noise_scale(norms, b, b * workers)
    assert found.samples == pytest.approx(variance / signal, rel=0.1)
    assert found.low < variance / signal < found.high
    assert found.high - found.low < 0.4 * found.samples


def test_the_noise_scale_of_a_training_sums_up_that_of_its_windows():
    """Windows with their own noise scales, trained with one batch, predict the steps of another one exactly."""
    scales, batch, other = [(10, 4.0), (20, 50.0), (5, 0.0), (40, 300.0)], 32.0, 8.0
    steps = sum(n / (1 + noise / batch) * (1 + noise / other) for n, noise in scales)
    found = noise_of_training(scales, batch)
    assert steps_ratio(found.samples, other, batch) == pytest.approx(steps / 75)
    assert found.low <= found.samples <= found.high
    # Nothing but noise: progress is in proportion to samples.
    assert noise_of_training([(10, math.inf)], batch).samples == math.inf
    assert math.isfinite(noise_of_training([*scales, (10, math.inf)], batch).samples)
    with pytest.raises(ValueError, match="no window"):
        noise_of_training([], batch)


def test_the_noise_scale_that_a_run_has_logged(tmp_path):
    step = tmp_path / "checkpoints" / "step-00000030"
    step.mkdir(parents=True)
    hashes = {"model.safetensors": "0" * 64, "state.pt": "0" * 64}
    manifest = Manifest(step=30, samples=960, world_size=2, sha256=hashes, global_batch_size=32, micro_batch_size=16)
    (step / "manifest.json").write_text(encode_manifest(manifest))
    lines = [{"step": 10, "train/noise_scale": 4.0}, {"step": 20, "val/loss": 1.0}, {"step": 30}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ConfigError, match="nowhere"):
        noise_of_run(tmp_path / "nowhere")
    lines[2]["train/noise_scale"] = None  # infinite: no gradient was left
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert noise_of_run(tmp_path).samples == noise_of_training([(10, 4.0), (20, math.inf)], 32).samples
    assert find_noise(tmp_path) == noise_of_run(tmp_path)
    assert find_noise(tmp_path / "plan.json") is None
    (tmp_path / "metrics.jsonl").write_text(json.dumps(lines[1]) + "\n")
    with pytest.raises(ConfigError, match=r"train it with --health\.noise-scale"):
        noise_of_run(tmp_path)


def test_noise_without_a_signal_and_without_noise():
    assert noise_scale([Norms(1.0, 0.25)] * 5, 1, 4).samples == math.inf
    assert noise_scale([Norms(1.0, 1.0)] * 5, 1, 4).samples == 0
    with pytest.raises(ValueError, match="no noise scale"):
        noise_scale([], 1, 4)
    assert steps_ratio(0, 64, 8) == 1
    assert steps_ratio(math.inf, 64, 8) == 1 / 8
    assert steps_ratio(64, 64, 8) == pytest.approx(2 / 9)


def test_agreement():
    assert agreement(Norms(1.0, 1.0), 4) == 1
    assert agreement(Norms(1.0, 0.25), 4) == 0
    assert agreement(Norms(1.0, 0.0), 2) == -1


def facts(**more):
    given = {
        "recipe": "lm",
        "unit": "tokens",
        "units_per_sample": 128.0,
        "micro_batch_size": 8,
        "accum_steps": 1,
        "ranks_per_host": 1,
        "alone": Compute(0.03, 0.06, 0.01),
        "together": Compute(0.03, 0.06, 0.01),
        "together_ranks": 1,
        "spread": 0.02,
        "buckets": (Bucket(0.2, 1 << 20), Bucket(1.0, 4 << 20)),
        "network": GIGABIT,
        "fp16_network": None,
        "noise": NoiseScale(200.0, 150.0, 300.0, 50),
        "steps_to_target": 1000,
        "recipe_batch": 64,
    }
    return Facts(**{**given, **more})


@pytest.mark.parametrize(("pace", "said"), [(1.0, False), (1.2, False), (0.6, True), (1.9, True)])
def test_a_network_that_is_another_one_in_a_step_is_said(pace, said):
    assert (f"{pace:.2f} times what single all-reduces tell" in describe(facts(pace=pace))) == said


@pytest.mark.parametrize("factor", [0.5, 2.9])
def test_measurements_that_contradict_each_other_recommend_nothing(tmp_path, factor):
    """147 ms were predicted where 431 had been measured for the same two ranks, on a busy machine."""
    step_s = answer(facts(), 2).rows[1].step.total_s
    fine = answer(facts(measured_steps_s={2: 1.1 * step_s}), 4)
    assert fine.recommended is not None
    busy = answer(facts(measured_steps_s={2: factor * step_s}), 4)
    assert busy.recommended is None
    text = table(busy)
    assert f"no recommendation: a step of 2 workers took {factor * step_s * 1e3:.4g} ms" in text
    assert "\n>" not in text
    save_html(tmp_path / "plan.html", busy)
    assert "lm: no recommendation" in (tmp_path / "plan.html").read_text()


def test_worker_counts():
    assert worker_counts(1) == [1]
    assert worker_counts(8) == [1, 2, 4, 8]
    assert worker_counts(12) == [1, 2, 4, 8, 12]


def test_the_table_by_hand():
    one, two, *_ = answer(facts(), 4, price=3.0).rows
    assert (one.step.total_s, one.efficiency, one.relative_time) == (pytest.approx(0.1), 1.0, 1.0)
    step = 0.1 + GIGABIT.seconds(4 << 20, Layout(2, 2))
    assert two.step.total_s == pytest.approx(step)
    assert two.efficiency == pytest.approx(0.1 / step)
    assert two.relative_steps == pytest.approx((1 + 200 / 16) / (1 + 200 / 8))
    assert two.relative_time == pytest.approx(step / 0.1 * two.relative_steps)
    assert two.time_low < two.relative_time < two.time_high
    hours = 1000 * (1 + 200 / 16) / (1 + 200 / 64) * step / 3600
    assert (two.hours, two.cost) == (pytest.approx(hours), pytest.approx(2 * hours * 3))


def test_memory_limits_where_a_larger_micro_batch_would_help_and_does_not_fit():
    # Half the samples take 80 % of the time: six tenths of a step are the same for any micro-batch.
    halves = {8: Compute(0.03, 0.06, 0.01), 4: Compute(0.024, 0.048, 0.008)}
    memory = {"memory_fixed_bytes": 100, "memory_sample_bytes": 10.0, "by_micro_batch": halves, "noise": None}
    full = facts(**memory, memory_free_bytes=255)
    assert full.most_samples == 15
    assert answer(full, 2).limit == "memory: a micro-batch twice as large does not fit (60% of the time at 2 workers)"
    assert "micro-batches of up to about 15 samples fit" in describe(full)
    roomy = facts(**memory, memory_free_bytes=260)
    assert "network" in answer(roomy, 2).limit
    assert facts().most_samples is None
    assert "memory" not in describe(facts())
    assert facts(**memory, memory_free_bytes=50).most_samples == 0


def test_a_slow_network_makes_few_workers_and_names_itself():
    quick = answer(facts(network=other_network(GIGABIT, "100gbit,1us")), 64)
    slow = answer(facts(network=other_network(GIGABIT, "100mbit,1us")), 64)
    assert slow.recommended.workers < quick.recommended.workers
    assert "bandwidth" in slow.limit
    assert "latency" in answer(facts(network=other_network(GIGABIT, "100gbit,5ms"), noise=None), 64).limit
    quiet = answer(facts(network=other_network(GIGABIT, "100gbit,1us"), noise=NoiseScale(1.0, 0.5, 2.0, 9)), 64)
    assert "batch" in quiet.limit
    assert quiet.recommended.workers < quick.recommended.workers
    link = other_network(GIGABIT, "100mbit,1us")
    in_fp16 = answer(facts(network=link, fp16_network=link, compression="fp16"), 64)
    for given in (slow, in_fp16):
        (faster,) = [factor for name, factor in given.changes if "four times the bandwidth" in name]
        assert faster < 0.9


def test_what_was_not_measured_is_not_predicted():
    nothing = answer(facts(network=None), 8)
    assert [row.workers for row in nothing.rows] == [1]
    assert "--link 25gbit,5us" in nothing.unknown
    inside = Network("mpi", 1e-4, 1e-6, 1e-10, None, None, 0.1, 2)
    some = answer(facts(network=inside, ranks_per_host=2), 8)
    assert [row.workers for row in some.rows] == [1, 2]
    assert "4 workers and more need the network between hosts" in some.unknown


def with_formats(**more):
    shapes = ((512, 512),)
    formats = {name: Format(name, {2: 1e-3, 4: 1e-3}, 0.01) for name in ("none", "fp16", "bf16", "int8", "topk:0.01")}
    buckets = (Bucket(1.0, 1 << 20, shapes),)
    return facts(**{"formats": formats, "buckets": buckets, "noise": None, **more})


def test_the_ways_to_average_on_a_slow_and_on_a_fast_network():
    slow = answer(with_formats(network=other_network(GIGABIT, "20mbit,20ms")), 2)
    text = table(slow)
    names = [row.method for row in slow.methods]
    assert names[0] == "every step"
    local = ["local SGD, 50 steps", "DiLoCo, 50 steps", "DiLoCo, 50 steps, int8"]
    assert names[-4:] == [*local, "DiLoCo, 50 steps, int8, 4 fragments, 7 late"]
    assert "every step, powersgd:4" not in names  # it was not measured
    assert slow.method.loss.change <= comparison.WITHIN
    assert slow.method.speedup > 1.3
    assert f"to average: {slow.method.method} ({slow.method.flags}): " in text
    assert f"{names[-1]} would be" in text
    assert max(row.speedup for row in slow.methods) == slow.methods[-1].speedup
    fast = answer(with_formats(network=other_network(GIGABIT, "100gbit,1us")), 2)
    assert fast.method.method == "every step"
    assert "to average: every step: exact" in table(fast)
    assert answer(with_formats(network=None), 2).methods == ()


def test_ways_to_average_are_those_between_hosts_where_there_are_several():
    """Where a slow network makes one host the best place, it is the other hosts for which a way is looked for."""
    both = Network("mpi", 1e-5, 1e-6, 1e-10, 20e-3, 8 / 20e6, 0.1, 4)
    shared = {"ranks_per_host": 4, "together_ranks": 4}
    slow = answer(with_formats(network=both, **shared), 16)
    assert slow.recommended.workers <= 4
    assert slow.changed_workers <= 4
    assert slow.method_workers == slow.method.workers == 8
    text = table(slow)
    assert "on 8 workers" in text
    assert f"to average: {slow.method.method} ({slow.method.flags}): " in text
    assert "measured it on small decoders" in text
    inside = replace(both, outside_latency_s=None, outside_byte_s=None)
    assert answer(with_formats(network=inside, **shared), 16).method_workers == 4
    # Where the recommended number spans hosts, it is that number.
    quick = answer(with_formats(network=other_network(GIGABIT, "100gbit,1us")), 16)
    assert quick.method_workers == quick.changed_workers == quick.recommended.workers


def test_a_loss_is_that_of_the_number_behind_the_format():
    """The loss of rank 4 says nothing of rank 8."""
    rank_4, rank_8 = (costs.loss_change(Method(f"powersgd:{rank}")).change for rank in (4, 8))
    assert rank_8 < rank_4
    assert costs.loss_change(Method("topk:0.010")) == costs.loss_change(Method("topk:0.01"))
    assert costs.loss_change(Method("powersgd:7")) is None
    assert costs.loss_change(Method("topk:0.5")) is None


def test_a_change_that_rounds_to_nothing_is_called_no_difference():
    assert difference(0.997, " time") == difference(1.0) == "no difference"
    assert difference(0.64, " time") == "36% less time"
    assert difference(1.75) == "75% more"


def test_a_format_that_contradicts_its_parts_is_not_recommended():
    network = other_network(GIGABIT, "20mbit,20ms")
    busy = with_formats(network=network)
    calm = answer(busy, 2).method.method
    compression = calm.removeprefix("every step, ")
    formats = {**busy.formats, compression: replace(busy.formats[compression], exchange_s=9.0, explained_s=3.0)}
    again = answer(replace(busy, formats=formats), 2)
    assert again.method.method != calm
    assert f"{calm}: all gradients took 9000 ms, and its parts, measured by themselves, explain 3000 ms" in table(again)
    formats = {**busy.formats, "none": replace(busy.formats["none"], exchange_s=1.0, explained_s=3.0)}
    none = answer(replace(busy, formats=formats), 2)
    assert none.method is None
    assert "to average: no recommendation: every step: " in table(none)


def test_a_way_that_training_refuses_beside_other_settings_is_not_recommended(tmp_path):
    slow = with_formats(network=other_network(GIGABIT, "20mbit,20ms"))
    calm = answer(slow, 2).method
    (fastest,) = [row for row in answer(slow, 2).methods if row.method.endswith("late")]
    refused = replace(slow, refused={calm.flags: "--optim.shard wants another", fastest.flags: "--train.ema, too"})
    again = answer(refused, 2)
    assert again.method.method not in (calm.method, fastest.method)
    assert f"{calm.method}: not with the recipe's other settings: --optim.shard wants another" in table(again)
    assert f"{fastest.method} would be" not in table(again)
    save_json(tmp_path / "plan.json", again, {})
    assert load_json(tmp_path).refused == refused.refused


@pytest.mark.parametrize(
    ("settings", "sound"),
    [
        ({}, 10),
        ({"optim": {"shard": True}}, 2),
        ({"train": {"precision": "fp16"}}, 3),
        ({"train": {"ema": 0.9}}, 6),
        ({"comm": {"op": "adasum"}}, 1),
        ({"health": {"noise_scale": True}}, 1),
    ],
)
def test_what_training_refuses_of_the_ways_is_found(settings, sound):
    recipe = load_recipe("mnist")
    for section, fields in settings.items():
        recipe = replace(recipe, **{section: replace(getattr(recipe, section), **fields)})
    found = _refused(recipe)
    assert len(methods_of(recipe.comm.compression, recipe.comm.period)) - len(found) == sound, found
    assert Method().flags not in found


def test_what_formats_compute_grows_along_a_line():
    measured = Format("topk:0.01", {2: 1.0, 4: 2.0, 8: 3.0})
    assert [measured.computes(n) for n in (1, 2, 3, 8, 16)] == [0.0, 1.0, 1.5, 3.0, 5.0]
    assert Format("none").computes(8) == 0.0


def test_flags_are_what_the_command_line_takes():
    methods = [Method("int8"), Method(period=20), Method("bf16", period=20, outer="nesterov")]
    methods += [Method("none", 20, "nesterov", 4, 3), Method()]
    assert [method.flags for method in methods] == [
        "--comm.compression int8",
        "--comm.sync local --comm.period 20",
        "--comm.compression bf16 --comm.sync local --comm.period 20 --comm.outer nesterov",
        "--comm.sync local --comm.period 20 --comm.outer nesterov --comm.fragments 4 --comm.overlap-steps 3",
        "",
    ]


def test_the_losses_that_plan_names_are_in_the_results():
    results = Path(__file__).parents[2] / "benchmarks" / "results"
    for change in [*costs._OF_FORMATS.values(), *costs._LOCAL.values()]:
        if not change.where:
            continue
        text = (results / change.where.partition(":")[0]).read_text()
        found = [float(number) / 100 for number in re.findall(r"([+-][\d.]+)%", text)]
        # compression.txt has nats: their difference over the mean of the losses.
        if nats := re.findall(r"^ +\d +([\d.]+) +[\d.]+ +([+-][\d.]+)$", text, re.MULTILINE):
            found.append(sum(float(b) for _, b in nats) / sum(float(a) for a, _ in nats))
        assert min(abs(change.change - number) for number in found) < 1e-4, change


def test_the_interval_grows_with_distance_and_with_unrest():
    errors = [row.error for row in answer(facts(), 64).rows]
    assert errors == sorted(errors)
    assert answer(facts(spread=0.3), 2).rows[0].error > 3 * errors[0]


def test_ranks_of_a_host_share_it():
    shared = facts(together=Compute(0.06, 0.12, 0.02), together_ranks=4, ranks_per_host=4)
    assert compute_on(shared, Layout(1, 1)) == shared.alone
    assert compute_on(shared, Layout(4, 1)) == shared.together
    assert compute_on(shared, Layout(16, 4)) == shared.together
    assert shared.alone.total_s < compute_on(shared, Layout(2, 1)).total_s < shared.together.total_s
    straggling = facts(together=Compute(0.09, 0.18, 0.03))  # one rank a host, and one of the hosts is slow
    assert compute_on(straggling, Layout(1, 1)) == straggling.alone
    assert compute_on(straggling, Layout(8, 8)) == straggling.together


def test_all_reduces_are_measured_up_to_the_size_of_the_largest_bucket():
    """A tied embedding may be 147 MiB, and buckets for GPUs 400: half of that says nothing of a fast network."""
    for largest in (3 << 20, 25 << 20, 147 << 20, 400 << 20):
        sizes = sizes_for([1 << 20, largest, 2 << 20])
        assert sizes[-1] == largest
        assert len(sizes) > 3
        assert all(0 < size <= largest for size in sizes)


def test_groups():
    assert groups_of(1, 1) == []
    assert groups_of(2, 2) == [(0,)]
    assert groups_of(8, 8) == [(0,), (0, 1), (0, 1, 2, 3)]
    assert groups_of(4, 2) == [(0,), (0, 1), (0, 2)]
    assert groups_of(8, 2) == [(0,), (0, 1), (0, 1, 2, 3), (0, 2), (0, 2, 4, 6)]
    assert groups_of(4, 1) == [(0,), (0, 1)]


def test_a_plan_is_kept_and_read_again(tmp_path):
    given = answer(facts(measured_steps_s={1: 0.1, 2: 0.14}, plain_mpi_s={4096: 1e-4}), 8, price=1.0)
    save_json(tmp_path / "plan.json", given, {"host": "x"})
    again = answer(load_json(tmp_path), 8, price=1.0)
    assert table(again) == table(given)
    assert describe(again.facts) == describe(given.facts)
    assert ">" in table(given)
    assert "(measured: 140 ms)" in table(given)
    for text, message in (
        ("{}", "was not written by this plan"),
        ("no", "is not JSON"),
        ('{"format_version": 1, "facts": {}}', "has format 1, this hvdtrain reads 3: measure again"),
    ):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_json(tmp_path / "other.json")
    with pytest.raises(ConfigError, match="let `plan RECIPE --output "):
        load_json(tmp_path / "nowhere")


def leaves(values, path=()):
    """Yield the path of each plain value."""
    if isinstance(values, dict | list) and values:
        for key, value in values.items() if isinstance(values, dict) else enumerate(values):
            yield from leaves(value, (*path, key))
    elif not isinstance(values, dict | list):
        yield path


@pytest.fixture(scope="module")
def saved_plan(tmp_path_factory):
    place = tmp_path_factory.mktemp("plan")
    known = with_formats(
        measured_steps_s={1: 0.1, 2: 0.14}, plain_mpi_s={4096: 1e-4}, noise=NoiseScale(9.0, 8.0, 9.0, 9)
    )
    known = replace(known, network=paced(GIGABIT, "all_gather", [Timing(Layout(2, 2), 9, 1e-3)]), fp16_network=GIGABIT)
    known = replace(known, by_micro_batch={8: known.alone, 4: Compute(0.02, 0.03, 0.01)})
    save_json(place / "plan.json", answer(known, 2), {})
    return json.loads((place / "plan.json").read_text())


@pytest.mark.parametrize("odd", [-1, math.nan, -math.inf, 1e300, 10**400, "x", True, [1], {"x": 1}], ids=repr)
def test_no_plan_is_made_of_what_was_never_measured(saved_plan, tmp_path, odd):
    """Each value of a saved plan, one after the other: seconds of -1 gave speeds below 0, nan an answer of nan."""
    places = list(leaves(saved_plan["facts"]))
    assert len(places) > 80
    taken = []
    for path in places:
        changed = json.loads(json.dumps(saved_plan))
        *above, last = ("facts", *path)
        holder = changed
        for name in above:
            holder = holder[name]
        if type(holder[last]) is type(odd):  # a text is a text
            continue
        holder[last] = odd
        (tmp_path / "plan.json").write_text(json.dumps(changed))
        with pytest.raises(ConfigError, match=r"was not written by this plan \("):
            taken.append((path, load_json(tmp_path)))
    assert not taken


def test_a_plan_without_oddities_is_read(saved_plan, tmp_path):
    (tmp_path / "plan.json").write_text(json.dumps(saved_plan))
    assert load_json(tmp_path).noise.measurements == 9
    saved_plan["facts"]["noise"]["high"] = math.inf
    (tmp_path / "plan.json").write_text(json.dumps(saved_plan))
    assert load_json(tmp_path).noise.high == math.inf


@pytest.mark.parametrize("accum_steps", [1, 2, 8])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_step_of_several_micro_batches_is_compared_with_such_a_step(accum_steps, ranks):
    """One micro-batch was compared with a step of several: no recommendation, on the quietest machine."""
    known = facts(accum_steps=accum_steps)
    known = replace(known, measured_steps_s=known.alone_measured_s)
    if ranks == 2:
        known = calibrated(known, 2, predict(known, 2).total_s)
    given = answer(known, 4)
    assert given.recommended is not None, given.reason
    for row in given.rows:
        assert known.measured_steps_s.get(row.workers, row.step.total_s) == pytest.approx(row.step.total_s)
    assert f"one rank:   {given.rows[0].step.total_s * 1e3:.4g} ms a step: " in describe(known)
    assert (" a micro-batch, " in describe(known)) == (accum_steps > 1)


def test_what_ranks_of_a_host_take_from_each_other_is_a_share_of_a_whole_step():
    shared = Compute(0.03, 0.06, 0.11)  # the optimizer alone takes longer, once in a step
    for accum_steps, share in ((1, 0.5), (10, 0.1 / 1.01)):
        known = facts(together=shared, together_ranks=2, ranks_per_host=2, accum_steps=accum_steps, noise=None)
        known = replace(known, network=Network("mpi", 1e-9, 1e-9, 1e-15, None, None, 0.1, 2))
        assert f"({share:.0%} of the time at 2 workers)" in answer(known, 2).limit


@pytest.mark.parametrize("link", ["0gbit,5us", "0.1kbit,5us", "9999999gbit,5us", "1gbit,60001ms", "1gbit,5us,", "nan"])
def test_links_that_cannot_be_are_refused(link):
    with pytest.raises(ConfigError, match=f"--link {link}: (the rate must be from 1kbit|write a rate)"):
        other_network(None, link)


def test_a_saved_plan_answers_for_its_own_recipe(saved_plan, tmp_path, capsys):
    (tmp_path / "plan.json").write_text(json.dumps(saved_plan))
    options = PlanOptions(from_=tmp_path, to=2)
    with pytest.raises(ConfigError, match="holds a plan of lm, not of mnist: measure mnist first"):
        plan("mnist", load_recipe("mnist"), options)
    assert plan("lm", load_recipe("lm"), options) == 0
    assert capsys.readouterr().out.startswith(f"plan lm, from what was measured in {tmp_path}\n")
