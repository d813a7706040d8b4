"""Recordings of ranks as one trace in Chrome's format, which Perfetto opens, and as an answer in words.

Each rank is a process. Its first threads are the steps, the phases and the collectives; then come its own threads, and
the streams of a GPU, as torch's profiler has seen them.
"""

from __future__ import annotations

import gzip
import json
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from hvdtrain.trainer.recorder import Recording
from hvdtrain.world.clocks import Offset
from hvdtrain.world.spans import Span

Interval = tuple[int, int]

_STEPS, _PHASES, _COLLECTIVES, _OTHERS = 1, 2, 10, 1000
_COMMUNICATION = "communication"
_MOST_OPERATORS, _MOST_RANKS = 5, 4


def trace_of(recordings: Sequence[Recording], offsets: Sequence[Offset]) -> dict[str, Any]:
    """Return the trace of all ranks on rank 0's clock; it begins at 0.

    Args:
        recordings: of the ranks that were recorded.
        offsets: of all ranks' clocks.
    """
    starts = [start + offsets[one.rank].ns for one in recordings for _, start, _ in one.phases]
    zero = min(starts, default=0)
    events = [event for one in recordings for event in _events_of(one, offsets[one.rank].ns - zero)]
    first = min((event["ts"] for event in events if "ts" in event), default=0.0)  # torch may have seen what was before
    for event in events:
        if "ts" in event:
            event["ts"] -= first
    events.sort(key=lambda event: (event["ph"] != "M", event.get("ts", 0.0)))
    clocks = {str(one.rank): offsets[one.rank] for one in recordings}
    return {
        "displayTimeUnit": "ms",
        "otherData": {
            "clock_offsets_us": {rank: offset.ns / 1000 for rank, offset in clocks.items()},
            "clock_uncertainties_us": {rank: offset.uncertainty_ns / 1000 for rank, offset in clocks.items()},
            "operators_left_out": {str(one.rank): one.num_left_out for one in recordings},
        },
        "traceEvents": events,
    }


def _events_of(one: Recording, shift: int) -> Iterable[dict[str, Any]]:
    pid = one.rank
    yield _named("process_name", pid, 0, f"rank {one.rank} on {one.host}")
    yield {"ph": "M", "name": "process_sort_index", "pid": pid, "tid": 0, "args": {"sort_index": one.rank}}
    yield _named("thread_name", pid, _STEPS, "steps")
    yield _named("thread_name", pid, _PHASES, "phases")
    for number, start, end in one.steps:
        yield _span(f"step {number}", pid, _STEPS, start + shift, end - start, "step", {"step": number})
    for phase, start, end in one.phases:
        yield _span(phase, pid, _PHASES, start + shift, end - start, "phase", {})
    lanes = in_lanes(one.spans)
    for lane, spans in enumerate(lanes):
        yield _named("thread_name", pid, _COLLECTIVES + lane, f"collectives {lane + 1}")
        for span in spans:
            about = {"kind": span.kind, "bytes": span.num_bytes}
            length = _end(span) - span.started
            yield _span(span.name, pid, _COLLECTIVES + lane, span.started + shift, length, "collective", about)
    yield from _operators(one, shift)


def _operators(one: Recording, shift: int) -> Iterable[dict[str, Any]]:
    """Yield what torch's profiler saw, the threads and streams of all devices under their rank."""
    if not one.operators:
        return
    threads: dict[tuple[str, str], int] = {}
    for event in json.loads(gzip.decompress(one.operators)):
        if event.get("ph") not in ("X", "s", "f") or event.get("cat") == "Trace":
            continue
        key = (str(event.get("pid")), str(event.get("tid")))
        if key not in threads:
            threads[key] = _OTHERS + len(threads)
            is_stream = event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
            name = f"GPU {key[0]} stream {key[1]}" if is_stream else f"thread {key[1]}"
            yield _named("thread_name", one.rank, threads[key], name)
        if "id" in event:  # of arrows, which must not lead from one rank to another
            event["id"] = f"{one.rank}.{event['id']}"
        yield {**event, "pid": one.rank, "tid": threads[key], "ts": event["ts"] + shift / 1000}


def _named(kind: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": name}}


def _span(name: str, pid: int, tid: int, start: int, length: int, kind: str, about: dict[str, Any]) -> dict[str, Any]:
    where = {"pid": pid, "tid": tid, "ts": start / 1000, "dur": length / 1000}
    return {"ph": "X", "name": name, "cat": f"hvdtrain.{kind}", **where, "args": about}


def _end(span: Span) -> int:
    return span.started if span.ended is None else span.ended


def in_lanes(spans: Iterable[Span]) -> list[list[Span]]:
    """Return collectives in as few rows as can be without two at a time in any: a thread of a trace holds no others."""
    lanes: list[list[Span]] = []
    for span in sorted(spans, key=lambda span: span.started):
        free = next((lane for lane in lanes if _end(lane[-1]) <= span.started), None)
        if free is None:
            lanes.append(free := [])
        free.append(span)
    return lanes


def in_words(recordings: Sequence[Recording]) -> list[str]:
    """Return where the time went: phases, how much communication was hidden, the operators that took longest."""
    done = [one for one in recordings if one.steps]
    if not done:
        return ["profile:    no step was recorded to its end"]
    lines = []
    for one in done[:_MOST_RANKS]:
        step_s = statistics.fmean(end - start for _, start, end in one.steps) / 1e9
        steps = [(start, end) for _, start, end in one.steps]
        of_phases: dict[str, float] = {}
        for phase, start, end in one.phases:
            seconds = overlap([(start, end)], steps) / 1e9 / len(steps)
            of_phases[phase] = of_phases.get(phase, 0.0) + seconds
        parts = sorted(of_phases.items(), key=lambda part: -part[1])
        said = ", ".join(f"{_WORDS.get(name, name)} {s / step_s:.0%}" for name, s in parts if s >= 0.005 * step_s)
        where = " of the host, which is ahead of its GPU," if one.computing else ""
        lines.append(f"profile:    rank {one.rank}: a step{where} of {step_s * 1e3:.1f} ms: {said}")
        lines += _about_kernels(one) if one.computing else _about_communication(one, steps)
    if len(done) > _MOST_RANKS:
        lines.append(f"            the other {len(done) - _MOST_RANKS} ranks are in the file")
    top = done[0].top
    total = sum(seconds for _, seconds in top) and sum(end - start for _, start, end in done[0].steps) / 1e9
    if total:
        named = ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in top[:_MOST_OPERATORS])
        lines.append(f"            most of rank {done[0].rank}'s time by operators: {named}")
    return lines


_WORDS = {_COMMUNICATION: "waiting for communication", "data": "waiting for data", "update": "optimizer"}


def _about_communication(one: Recording, steps: Sequence[Interval]) -> list[str]:
    busy = union((span.started, _end(span)) for span in one.spans)
    in_steps = overlap(busy, steps)
    if not in_steps:
        return []
    waited = union((start, end) for phase, start, end in one.phases if phase == _COMMUNICATION)
    backward = union((start, end) for phase, start, end in one.phases if phase == "backward")
    exposed = overlap(_both(busy, waited), steps)
    behind = overlap(_both(busy, backward), steps)
    each = 1e6 * len(steps)
    return [
        f"            communication was under way for {in_steps / each:.1f} ms of it: {1 - exposed / in_steps:.0%} of"
        f" that was hidden, {behind / in_steps:.0%} behind backward; {exposed / each:.1f} ms were waited for"
    ]


def _about_kernels(one: Recording) -> list[str]:
    """Say the same of a GPU, by its own clock: the host waits for no communication there."""
    on_wire, computing = union(one.on_wire), union(one.computing)
    total = sum(end - start for start, end in on_wire)
    if not total:
        return []
    hidden = overlap(on_wire, computing)
    each = 1e6 * len(one.steps)
    return [
        f"            NCCL's kernels ran for {total / each:.1f} ms of it: {hidden / total:.0%} of that beside others;"
        f" {(total - hidden) / each:.1f} ms alone"
    ]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Return the same moments as intervals that do not overlap, in their order."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def _both(one: Sequence[Interval], other: Sequence[Interval]) -> list[Interval]:
    """Return the moments of both, of intervals that are in order and do not overlap among themselves."""
    found: list[Interval] = []
    place = 0
    for start, end in one:
        while place < len(other) and other[place][1] <= start:
            place += 1
        at = place
        while at < len(other) and other[at][0] < end:
            found.append((max(start, other[at][0]), min(end, other[at][1])))
            at += 1
    return found


def overlap(one: Sequence[Interval], other: Sequence[Interval]) -> int:
    """Return how long both are, of intervals that do not overlap among themselves."""
    return sum(end - start for start, end in _both(one, other))
