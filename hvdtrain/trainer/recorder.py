"""What one rank does in some steps: its phases, its collectives, and the operators that torch's profiler sees."""

from __future__ import annotations

import gzip
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from hvdtrain.process.progress import Phase, Progress
from hvdtrain.world import World
from hvdtrain.world.spans import CollectiveSpans, Span

_MARK = "hvdtrain: clocks meet"
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
    top: list[tuple[str, float, int]] = field(default_factory=list)
    """The operators that took longest by themselves: name, seconds and calls."""


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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what torch's profiler does not find on this machine
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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._profile.stop()
        if recording.steps and not recording.steps[-1][2]:  # it was not taken, or not to its end
            recording.steps.pop()
        self._take_operators()
        return recording

    def drop(self) -> None:
        """End it, and keep nothing."""
        self._phases.stop()
        self._spans.stop()
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
        self._recording.operators = gzip.compress(json.dumps(kept).encode(), 1)
        self._recording.top = self._top()

    def _top(self) -> list[tuple[str, float, int]]:
        is_gpu = self._world.device.type == "cuda"
        own = [
            (str(item.key), (item.self_device_time_total if is_gpu else item.self_cpu_time_total) / 1e6, item.count)
            for item in self._profile.key_averages()
            if item.key != _MARK
        ]
        return sorted(own, key=lambda item: -item[1])[:_TOP]


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
