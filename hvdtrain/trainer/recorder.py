"""What one rank does in some steps: its phases, its collectives, and the operators that torch's profiler sees."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from hvdtrain.process.progress import Phase, Progress
from hvdtrain.world import World
from hvdtrain.world.spans import CollectiveSpans, Span

_MARK = "hvdtrain: clocks meet"
_LEVEL = "KINETO_LOG_LEVEL"
# More operators of a rank than these are left out, the shortest first.
_MOST_EVENTS = 200_000
_TOP = 12


@dataclass
class Recording:
    """What was recorded of a rank; times in nanoseconds of its `time.perf_counter_ns`."""

    rank: int
    host: str
    phases: list[tuple[str, int, int]] = field(default_factory=list)
    """Phase, start and end, without gaps."""
    steps: list[tuple[int, int, int]] = field(default_factory=list)
    """Number, start and end of each step."""
    spans: list[Span] = field(default_factory=list)
    operators: bytes = b""
    """The events of torch's profiler, as JSON, packed; times in microseconds of the same clock."""
    num_left_out: int = 0
    """Operators that were too many."""
    top: list[tuple[str, float]] = field(default_factory=list)
    """The operators that took longest by themselves: name and seconds."""
    on_wire: list[tuple[int, int]] = field(default_factory=list)
    """Start and end of each of NCCL's kernels, on a GPU."""
    computing: list[tuple[int, int]] = field(default_factory=list)
    """The same of all other kernels."""


class Recorder:
    """Records this rank from `start` to `stop`."""

    def __init__(self, world: World, host: str) -> None:
        self._world = world
        self._recording = Recording(world.rank, host)
        self._spans = CollectiveSpans(world)
        self._phases = _Phases(world.progress)
        activities = [ProfilerActivity.CPU]
        if world.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(activities=activities)
        self._marked = 0

    def start(self, step: int) -> None:
        """Begin, before step number `step`."""
        with _silent():
            self._profile.start()
        before = time.perf_counter_ns()
        with record_function(_MARK):
            pass
        self._marked = (before + time.perf_counter_ns()) // 2
        self._spans.start()
        self._phases.start()
        self.begin_step(step)

    def begin_step(self, step: int) -> None:
        """Note that step number `step` begins."""
        self._recording.steps.append((step, time.perf_counter_ns(), 0))

    def end_step(self) -> None:
        """Note that it has ended."""
        number, started, _ = self._recording.steps[-1]
        self._recording.steps[-1] = (number, started, time.perf_counter_ns())

    def stop(self) -> Recording:
        """End it, and return what was recorded."""
        if self._world.device.type == "cuda":
            torch.cuda.synchronize(self._world.device)
        recording = self._recording
        recording.phases = self._phases.stop()
        self._spans.stop()
        recording.spans = self._spans.spans
        with _silent():
            self._profile.stop()
        if recording.steps and not recording.steps[-1][2]:  # it was not taken, or not to its end
            recording.steps.pop()
        self._take_operators()
        return recording

    def drop(self) -> None:
        """End it, and keep nothing."""
        self._phases.stop()
        self._spans.stop()
        with _silent():
            self._profile.stop()

    def _take_operators(self) -> None:
        with tempfile.TemporaryDirectory(prefix="hvdtrain-profile-") as folder:
            file = Path(folder) / "trace.json"
            self._profile.export_chrome_trace(str(file))
            events = json.loads(file.read_text(encoding="utf-8", errors="replace"))["traceEvents"]
        mark = next((event for event in events if event.get("name") == _MARK), None)
        shift = self._marked / 1000 - (mark["ts"] + mark.get("dur", 0) / 2) if mark else 0.0
        kept = [event for event in events if event is not mark and mark is not None]
        timed = [event for event in kept if event.get("ph") == "X"]
        if len(timed) > _MOST_EVENTS:
            least = sorted((event.get("dur", 0) for event in timed), reverse=True)[_MOST_EVENTS]
            short = {id(event) for event in timed if event.get("dur", 0) <= least}
            kept = [event for event in kept if id(event) not in short]
            self._recording.num_left_out = len(short)
        for event in kept:
            if "ts" in event:
                event["ts"] += shift
        recording = self._recording
        recording.operators = gzip.compress(json.dumps(kept).encode(), 1)
        recording.top = longest(kept, self._world.device.type == "cuda")
        recording.on_wire, recording.computing = kernels(kept)
        end_with_kernels(recording.spans, recording.on_wire)


def kernels(events: Sequence[Mapping[str, Any]]) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Return start and end, in nanoseconds, of NCCL's kernels and of all others, in the order of their start."""
    found: tuple[list[tuple[int, int]], list[tuple[int, int]]] = [], []
    for event in events:
        if event.get("ph") == "X" and event.get("cat") == "kernel":
            is_other = not event["name"].startswith("nccl")
            found[is_other].append((round(event["ts"] * 1000), round((event["ts"] + event["dur"]) * 1000)))
    return sorted(found[0]), sorted(found[1])


def end_with_kernels(spans: Sequence[Span], on_wire: Sequence[tuple[int, int]]) -> None:
    """Have the collectives of a GPU end with NCCL's kernels.

    What Horovod says of one is when it has handed it to NCCL's stream, where they follow one another in that order.
    Where there are not as many kernels, as of a collective that NCCL does in several, they end as handed over.
    """
    handed = sorted((span for span in spans if span.is_on_gpu), key=lambda span: span.ended or 0)
    if len(handed) == len(on_wire):
        for span, (_, end) in zip(handed, on_wire, strict=True):
            span.ended = max(end, span.started)


def longest(events: Sequence[Mapping[str, Any]], is_gpu: bool) -> list[tuple[str, float]]:
    """Return the operators that took longest by themselves: name and seconds.

    On a GPU these are its kernels; on a CPU the time of an operator without that of those within it. (`key_averages` of
    torch's profiler says the same, and takes ten times as long as all else that is done with its events.)

    Args:
        events: with times in microseconds; those of a thread lie within each other, or apart.
        is_gpu: whether kernels are asked for.
    """
    found: dict[str, float] = {}
    kind = "kernel" if is_gpu else "cpu_op"
    timed = [event for event in events if event.get("ph") == "X" and event.get("cat") == kind]
    timed.sort(key=lambda event: (str(event["tid"]), event["ts"], -event["dur"]))
    own = [float(event["dur"]) for event in timed]
    within: list[int] = []
    for number, event in enumerate(timed):
        while within and not _holds(timed[within[-1]], event):
            within.pop()
        if within and not is_gpu:
            own[within[-1]] -= event["dur"]
        within.append(number)
    for event, microseconds in zip(timed, own, strict=True):
        found[event["name"]] = found.get(event["name"], 0.0) + microseconds / 1e6
    return sorted(found.items(), key=lambda item: -item[1])[:_TOP]


def _holds(outer: Mapping[str, Any], inner: Mapping[str, Any]) -> bool:
    return bool(outer["tid"] == inner["tid"] and inner["ts"] < outer["ts"] + outer["dur"])


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep torch's profiler from saying on standard error that it begins and ends; it asks once (torch 2.13)."""
    before = os.environ.get(_LEVEL)
    os.environ.setdefault(_LEVEL, "99")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what it does not find on this machine
            yield
    finally:
        if before is None:
            del os.environ[_LEVEL]


class _Phases:
    """Notes when the phases of a rank begin, without getting in the way of who looks at its progress."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._turns: list[tuple[str, int]] = []

    def start(self) -> None:
        """Begin to take notes."""
        self._note("between steps")
        enter, begin_step = self._progress.enter, self._progress.begin_step
        self._shadow("enter", enter, lambda phase: phase)
        self._shadow("begin_step", begin_step, lambda step: "data")

    def stop(self) -> list[tuple[str, int, int]]:
        """End it; returns each phase with its start and its end."""
        for name in ("enter", "begin_step"):
            vars(self._progress).pop(name, None)
        self._note("")
        pairs = zip(self._turns, self._turns[1:], strict=False)
        return [(phase, since, until) for (phase, since), (_, until) in pairs if until > since]

    def _shadow(self, name: str, method: Callable[[Any], None], phase_of: Callable[[Any], Phase | str]) -> None:
        def noted(argument: Any) -> None:
            self._note(phase_of(argument))
            method(argument)

        vars(self._progress)[name] = noted

    def _note(self, phase: str) -> None:
        self._turns.append((phase, time.perf_counter_ns()))
