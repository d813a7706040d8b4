"""What happened in a run, by step: saves, restarts, skipped steps, warnings, its end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from hvdtrain.verbs.report.rank_log import restarts, warnings
from hvdtrain.verbs.report.runs import ReadRun

KINDS = {
    "finished": ("finished", "square", "■"),
    "restart": ("went on after a stop", "diamond", "◆"),
    "spike": ("spike of loss or gradient", "asterisk", "✳"),
    "slow": ("a slow rank", "hex", "⬢"),
    "network": ("a slow network", "plus", "✚"),
    "skipped": ("skipped steps", "x", "✕"),
    "failed": ("a save that failed", "inverted_triangle", "▼"),
    "warning": ("warning", "star", "★"),
    "save": ("save", "triangle", "▲"),
    "other": ("another event", "circle", "●"),
}
"""Kind -> what it is called, its marker, and the marker as a character; the rarest first."""
# Of more events of a kind some are shown, from the first to the last.
_MOST = 100
_LONGEST = 160
# Warnings that are events of their own kind, by what they say.
_WARNINGS = {
    ": a spike: ": "spike",
    " is slow, and all others wait": "slow",
    ": the network between the hosts ": "network",
}


@dataclass(frozen=True)
class Event:
    """Something that happened after a step."""

    step: int
    kind: str
    text: str


def events_of(run: ReadRun) -> list[Event]:
    """Return the events of a run by step; of a kind that is frequent, some."""
    found = [*_events(run)]
    kept: list[Event] = []
    for kind in KINDS:
        of_kind = sorted((event for event in found if event.kind == kind), key=lambda event: event.step)
        places = np.linspace(0, len(of_kind) - 1, min(len(of_kind), _MOST)).astype(int)
        kept += [of_kind[place] for place in places]
    return sorted(kept, key=lambda event: event.step)


def _events(run: ReadRun) -> Iterator[Event]:
    for step, name in run.events:
        yield Event(step, name if name in KINDS else "other", name)
    for step, text in restarts(run.records):
        yield Event(step, "restart", text)
    for warned_step, text in warnings(run.records):
        if warned_step is not None and warned_step <= run.last_step:
            kind = next((kind for words, kind in _WARNINGS.items() if words in text), "warning")
            yield Event(warned_step, kind, text[:_LONGEST])
    yield from _counted(run, "train/skipped_steps", "skipped", "skipped steps up to here")
    yield from _counted(run, "checkpoint/failed", "failed", "saves failed before here")
    for step in run.saves:
        yield Event(step, "save", "checkpoint, kept")
    yield from _saves_not_kept(run)


def _counted(run: ReadRun, metric: str, kind: str, text: str) -> Iterator[Event]:
    curve = run.curves.get(metric)
    for step, value in zip(curve.steps, curve.values, strict=True) if curve else ():
        if value > 0:
            yield Event(int(step), kind, f"{value:g} {text}")


def _saves_not_kept(run: ReadRun) -> Iterator[Event]:
    """Yield the saves that held training up, but whose checkpoint is gone: a line of metrics is the first after one."""
    stalls = run.curves.get("time/checkpoint_stall_s")
    lines = run.curves.get("time/step_s")
    if stalls is None or lines is None:
        return
    kept = np.array(sorted(run.saves), dtype=np.float64)
    before = lines.steps[np.maximum(np.searchsorted(lines.steps, stalls.steps) - 1, 0)]
    for step, since, seconds in zip(stalls.steps, before, stalls.values, strict=True):
        if not ((kept >= since) & (kept <= step)).any():
            yield Event(int(step), "save", f"saved by here; training waited {seconds:.2g} s")
