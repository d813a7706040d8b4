"""`--profile.timeline`: what is recorded, how it is put together, and what is said of it."""

import dataclasses
import gzip
import itertools
import json
import random
import tempfile
from pathlib import Path

import pytest
import torch
from portraits import small
from thread_world import run_ranks
from torch.profiler import ProfilerActivity, profile
from trace_format import faults_of

from hvdtrain import Callback
from hvdtrain.errors import ConfigError
from hvdtrain.process.launch import Launch
from hvdtrain.recipes.given import apply
from hvdtrain.rundir.directory import RunDirectory
from hvdtrain.rundir.log import MetricLog
from hvdtrain.settings import ProfileConfig
from hvdtrain.settings.values import Source, nested
from hvdtrain.trainer import fit, settle
from hvdtrain.trainer.recorder import Recording, end_with_kernels, kernels, longest
from hvdtrain.trainer.trace import in_lanes, in_words, overlap, trace_of, union
from hvdtrain.world import SoloWorld
from hvdtrain.world.clocks import Offset, offset_between
from hvdtrain.world.spans import CollectiveSpans, Span

MS = 1_000_000


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"timeline": "3"}, "two steps, such as 20:22"),
        ({"timeline": "a:b"}, "two steps"),
        ({"timeline": "0:3"}, "from 1 on"),
        ({"timeline": "4:3"}, "A not above B"),
        ({"timeline": "1:101"}, "more than 100 steps"),
        ({"timeline": "1:2", "ranks": "first"}, "must be all, or numbers"),
        ({"timeline": "1:2", "ranks": "0,"}, "must be all, or numbers"),
    ],
)
def test_what_is_no_timeline(given, said):
    with pytest.raises(ConfigError, match=said):
        ProfileConfig(**given)


def test_ranks_that_are_recorded():
    def ranks(given, size):
        return ProfileConfig(timeline="1:2", ranks=given).of_ranks(size)

    assert [ranks(None, size) for size in (1, 2, 4)] == [[0], [0, 1], [0, 1]]
    assert ranks("all", 3) == [0, 1, 2]
    assert ranks("3,0,3", 4) == [0, 3]
    with pytest.raises(ConfigError, match="the ranks are 0 to 1"):
        ranks("0,2", 2)


def test_offsets_of_clocks_are_bounds():
    """Whatever the delays, the true offset lies within the uncertainty that is told."""
    draw = random.Random(1)
    for _ in range(200):
        true, drift = draw.randrange(-(10**12), 10**12), draw.randrange(1, 10**6)
        here, there, now = [], [], 0
        for _ in range(30):
            now += draw.randrange(drift)
            entered = [now + draw.randrange(drift) for _ in range(2)]
            left = [max(entered) + draw.randrange(1, drift + 1) for _ in range(2)]
            here.append((entered[0], left[0]))
            there.append((entered[1] - true, left[1] - true))
            now = max(left)
        found = offset_between(here, there)
        assert abs(found.ns - true) <= found.uncertainty_ns + 1
        assert found.uncertainty_ns <= 2 * drift
    assert offset_between(here, here).ns == 0


def operators(*events):
    return gzip.compress(json.dumps(events).encode())


@pytest.fixture
def two():
    """Two ranks; the second one's clock is 5 ms behind. Backward from 4 to 8 ms, then 2 ms of waiting."""
    recordings = []
    for rank, shift in ((0, 0), (1, -5 * MS)):
        phases = [("forward", 0, 4), ("backward", 4, 8), ("communication", 8, 10), ("update", 10, 12)]
        spans = [Span("gradients.a", "all_reduce", 8, 5, 7), Span("gradients.b", "all_reduce", 8, 6, 10)]
        mm = {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "pid": 77, "tid": 77, "ts": 1000 + shift / 1000, "dur": 9}
        recordings.append(
            Recording(
                rank,
                "here",
                phases=[(name, start * MS + shift, end * MS + shift) for name, start, end in phases],
                steps=[(3, shift, 12 * MS + shift)],
                spans=[Span(s.name, s.kind, 8, s.started * MS + shift, s.ended * MS + shift) for s in spans],
                operators=operators(mm, {"ph": "M", "name": "x"}, {"ph": "s", "id": 1, "ts": 1, "pid": 77, "tid": 77}),
                top=[("aten::mm", 0.006)],
            )
        )
    return recordings, [Offset(0, 0), Offset(5 * MS, 1000)]


def test_ranks_are_processes_on_one_clock(two):
    trace = json.loads(json.dumps(trace_of(*two)))
    events = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert {event["pid"] for event in events} == {0, 1}
    of_ranks = [[{**event, "pid": 0} for event in events if event["pid"] == rank] for rank in (0, 1)]
    assert of_ranks[0] == of_ranks[1], "the clocks are corrected"
    assert [event["ts"] for event in events] == sorted(event["ts"] for event in events)
    assert min(event["ts"] for event in events) == 0
    known = {(e["name"], e["pid"], e["tid"]): e["args"] for e in trace["traceEvents"] if e["ph"] == "M"}
    assert known["process_name", 1, 0] == {"name": "rank 1 on here"}
    assert {(e["pid"], e["tid"]) for e in events} == {(p, t) for name, p, t in known if name == "thread_name"}
    assert {e["id"] for e in trace["traceEvents"] if "id" in e} == {"0.1", "1.1"}
    assert trace["otherData"]["clock_offsets_us"] == {"0": 0, "1": 5000}


def test_where_the_time_went_in_words(two):
    lines = in_words(two[0])
    assert lines[0].endswith(
        "rank 0: a step of 12.0 ms: forward 33%, backward 33%, waiting for communication 17%, optimizer 17%"
    )
    assert "under way for 5.0 ms of it: 60% of that was hidden, 60% behind backward; 2.0 ms were waited for" in lines[1]
    assert lines[-1].endswith("by operators: aten::mm 50%")
    many = [dataclasses.replace(two[0][0], rank=rank) for rank in range(7)]
    assert "            the other 3 ranks are in the file" in in_words(many)
    assert in_words([Recording(0, "here")]) == ["profile:    no step was recorded to its end"]


def test_no_row_holds_two_collectives_at_a_time():
    draw = random.Random(2)
    spans = [
        Span(str(i), "all_reduce", 1, start := draw.randrange(1000), start + draw.randrange(50)) for i in range(200)
    ]
    lanes = in_lanes(spans)
    assert sum(map(len, lanes)) == 200
    for lane in lanes:
        assert all(before.ended <= after.started for before, after in itertools.pairwise(lane))


def test_intervals_as_sets_of_moments():
    draw = random.Random(3)
    for _ in range(100):
        one, other = ([(a := draw.randrange(40), a + draw.randrange(9)) for _ in range(6)] for _ in range(2))
        moments = [{m for start, end in which for m in range(start, end)} for which in (one, other)]
        assert sum(end - start for start, end in union(one)) == len(moments[0])
        assert overlap(union(one), union(other)) == len(moments[0] & moments[1])


def test_collectives_are_noted_only_between_start_and_stop():
    def work(world):
        world.all_reduce(torch.ones(2), "sum", "before")
        before = dict(vars(world))
        notes = CollectiveSpans(world)
        notes.start()
        total = world.all_reduce(torch.ones(4), "sum", "between")
        world.all_gather(torch.ones(3), "rows")
        world.start_all_reduce(torch.ones(2), "sum", "open")
        notes.stop()
        world.all_reduce(torch.ones(2), "sum", "after")
        assert vars(world).keys() == before.keys()
        return total.tolist(), notes.spans

    for total, spans in run_ranks(2, work):
        assert total == [2] * 4
        assert [(span.name, span.kind) for span in spans] == [
            ("between", "all_reduce"),
            ("rows", "all_gather"),
            ("open", "all_reduce"),
        ]
        assert spans[0].num_bytes == 16
        assert all(span.started <= span.ended for span in spans)


def test_the_time_of_operators_by_themselves():
    """The sums are those of torch's profiler, which are compared on what it has recorded itself."""
    layers = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8))
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(3):
            layers(torch.ones(4, 8)).sum().backward()
    with tempfile.TemporaryDirectory() as folder:
        recorded.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    torchs = {item.key: item.self_cpu_time_total / 1e6 for item in recorded.key_averages()}
    found = longest(events, is_gpu=False)
    assert len(found) == 12
    assert [seconds for _, seconds in found] == sorted((seconds for _, seconds in found), reverse=True)
    for name, seconds in found:
        assert seconds == pytest.approx(torchs[name], rel=0.02, abs=2e-5)
    kernels = [{"ph": "X", "cat": "kernel", "name": "sum", "tid": 7, "ts": 10 * n, "dur": 5} for n in range(3)]
    assert longest([*events, *kernels], is_gpu=True) == [("sum", pytest.approx(15e-6))]


def kernel(name, start, length):
    return {"ph": "X", "cat": "kernel", "name": name, "pid": 0, "tid": 7, "ts": start * 1000.0, "dur": length * 1000.0}


def test_collectives_of_a_gpu_end_with_the_kernels_of_nccl():
    """Horovod says when it has handed one over, not when it is through; the host's own collectives it does not."""
    on_wire, computing = kernels(
        [kernel("ncclDevKernel_B", 8, 4), kernel("gemm", 1, 9), kernel("ncclDevKernel_A", 3, 2)]
    )
    assert on_wire == [(3 * MS, 5 * MS), (8 * MS, 12 * MS)]
    assert computing == [(1 * MS, 10 * MS)]
    spans = [
        Span("b", "all_reduce", 8, 2 * MS, 4 * MS, is_on_gpu=True),
        Span("a", "all_reduce", 8, 1 * MS, 3 * MS, is_on_gpu=True),
        Span("question", "all_reduce", 8, 1 * MS, 2 * MS),
    ]
    end_with_kernels(spans, on_wire[:1])  # one of them was done in another way
    assert [span.ended for span in spans] == [4 * MS, 3 * MS, 2 * MS]
    end_with_kernels(spans, on_wire)
    assert [span.ended for span in spans] == [12 * MS, 5 * MS, 2 * MS]


def test_what_is_hidden_on_a_gpu_is_what_runs_beside_other_kernels(two):
    (one, _), _ = two
    one.on_wire, one.computing = [(3 * MS, 5 * MS), (8 * MS, 12 * MS)], [(1 * MS, 4 * MS), (3 * MS, 10 * MS)]
    lines = in_words([one])
    assert "a step of the host, which is ahead of its GPU, of 12.0 ms: forward 33%" in lines[0]
    assert lines[1].endswith("NCCL's kernels ran for 6.0 ms of it: 67% of that beside others; 2.0 ms alone")
    assert len(lines) == 3
    one.on_wire = []  # on one GPU
    assert len(in_words([one])) == 2


class Ends(Callback):
    """Ends the run after a step."""

    def __init__(self, step):
        self.step = step

    def after_step(self, run):
        if run.step == self.step:
            run.stop("enough")


class Said(MetricLog):
    def __init__(self):
        super().__init__(None, [])
        self.lines = []

    def say(self, text):
        self.lines.append(text)


def trained(folder, given, *callbacks):
    """Train the small recipe for six steps; returns its weights, its trace and what was said."""
    recipe = apply(small(), [(nested(given), Source("train()"))])
    run, world, log = RunDirectory(folder), SoloWorld(torch.device("cpu"), Launch("none")), Said()
    task = dataclasses.replace(recipe.build(log.say), callbacks=callbacks)
    folder.mkdir(parents=True, exist_ok=True)
    job = settle(task, recipe, world, run, log, ("seen",))
    fit(job)
    assert not {"enter", "begin_step"} & vars(world.progress).keys()
    trace = json.loads(run.timeline.read_text()) if run.timeline.exists() else None
    assert trace is None or faults_of(trace) == []
    return {name: tensor.clone() for name, tensor in task.model.state_dict().items()}, trace, log.lines


def steps_in(trace):
    return [event["args"]["step"] for event in trace["traceEvents"] if event.get("cat") == "hvdtrain.step"]


def test_a_run_is_the_same_with_and_without(tmp_path):
    plain, nothing, _ = trained(tmp_path / "plain", {})
    weights, trace, lines = trained(tmp_path / "run", {"profile.timeline": "2:3"})
    assert nothing is None
    assert all(torch.equal(weights[name], plain[name]) for name in plain)
    assert steps_in(trace) == [2, 3]
    spans = {e["name"]: e for e in trace["traceEvents"] if e.get("cat") == "hvdtrain.step"}
    whole = [e for e in trace["traceEvents"] if e.get("cat") == "cpu_op"]
    within = [
        e for e in whole for s in spans.values() if s["ts"] <= e["ts"] and e["ts"] + e["dur"] <= s["ts"] + s["dur"]
    ]
    assert len(within) > 0.8 * len(whole) > 100, "the operators lie in the steps that they belong to"
    phases = {e["name"] for e in trace["traceEvents"] if e.get("cat") == "hvdtrain.phase"}
    assert {"data", "forward", "backward", "update"} <= phases
    assert any("steps 2 to 3 of rank 0 will be in" in line for line in lines)
    assert any("a step of" in line and "forward" in line for line in lines)


@pytest.mark.parametrize(
    ("asked", "callbacks", "steps"), [("1:1", [], [1]), ("5:9", [], [5, 6]), ("2:5", [Ends(3)], [2, 3])]
)
def test_a_run_that_ends_before_writes_what_it_has(tmp_path, asked, callbacks, steps):
    _, trace, _ = trained(tmp_path / "run", {"profile.timeline": asked}, *callbacks)
    assert steps_in(trace) == steps


def test_steps_that_there_are_not(tmp_path):
    with pytest.raises(ConfigError, match="7:8: the run has 6 steps"):
        trained(tmp_path / "a", {"profile.timeline": "7:8"})
    with pytest.raises(ConfigError, match="the ranks are 0 to 0"):
        trained(tmp_path / "b", {"profile.timeline": "1:2", "profile.ranks": "1"})
    trained(tmp_path / "c", {"train.steps": 4})
    _, trace, lines = trained(tmp_path / "c", {"profile.timeline": "1:2"})
    assert trace is None
    assert any("the steps to record are over" in line for line in lines)


def test_a_timeline_that_cannot_be_written_ends_no_run(tmp_path):
    (tmp_path / "run" / "timeline.json").mkdir(parents=True)
    (tmp_path / "run" / "timeline.json" / "in the way").touch()
    run = RunDirectory(tmp_path / "run")
    recipe = apply(small(), [(nested({"profile.timeline": "1:2"}), Source("train()"))])
    log = Said()
    task = recipe.build(log.say)
    fit(settle(task, recipe, SoloWorld(torch.device("cpu"), Launch("none")), run, log))
    assert any("the timeline is lost" in line for line in log.lines)


def test_what_breaks_the_format_is_seen(two):
    """The check of the documented format can fail: on what it is given below, and on an arrow without an end."""
    trace = trace_of(*two)
    assert [fault.partition(":")[0] for fault in faults_of(trace)] == ["no name", "no cat", "an arrow of one end"]
    slice_ = {"ph": "X", "name": "a", "cat": "b", "pid": 0, "tid": 1, "ts": 1.0, "dur": 5.0}
    for change, fault in (
        ({"ts": -1.0}, "ts is no time"),
        ({"dur": float("nan")}, "dur is no length"),
        ({"tid": "one"}, "pid and tid are no numbers"),
        ({"ph": "?"}, "unknown ph"),
        ({"ts": 4.0}, "slices that overlap"),
    ):
        found = faults_of({"displayTimeUnit": "ms", "traceEvents": [slice_, {**slice_, **change}]})
        assert found
        assert found[0].startswith(fault)
