"""Where a GPU's time goes, without waiting for it: events among its work, read when it has long done that."""

from __future__ import annotations

from collections import deque
from itertools import pairwise

import torch

from hvdtrain.process.progress import Phase, Progress
from hvdtrain.world import World

# Every so many steps one is timed, and the first after a line: an event costs the host about as much as a small kernel.
_STRIDE = 8

_Mark = tuple[Phase, torch.cuda.Event]


def finish(device: torch.device) -> None:
    """Wait until a GPU has done what it was given; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def progress_of(world: World) -> Progress:
    """Return what notes this rank's phases in training: a GPU's by its own clock."""
    return DeviceProgress() if world.device.type == "cuda" else world.progress


class DeviceProgress(Progress):
    """Tells of phases as the GPU lives them: the host only hands it work, and is ahead of it.

    Some steps are timed, by an event at each change of phase. Between two events lies the work that was handed over
    meanwhile, what the stream waits for, such as averages, and the GPU's idle time where data or the host is late.
    """

    def __init__(self) -> None:
        super().__init__()
        self._marks: list[_Mark] = []
        """Of the step that is being timed."""
        self._timed: deque[list[_Mark]] = deque()
        """Steps whose events have not been read."""
        self._is_timed = False
        self._steps_since = 0
        self._totals: dict[Phase, float] = dict.fromkeys(self._spent, 0.0)

    def begin_step(self, step: int) -> None:
        """Note a new step, and whether it is timed."""
        super().begin_step(step)
        self._is_timed = self._steps_since % _STRIDE == 0
        self._steps_since += 1
        self._marks = []
        self._mark("data")

    def enter(self, phase: Phase) -> None:
        """Note the phase."""
        super().enter(phase)
        self._mark(phase)
        if phase == "between steps" and self._is_timed:
            self._timed.append(self._marks)
            self._is_timed = False

    def _mark(self, phase: Phase) -> None:
        if self._is_timed:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._marks.append((phase, event))

    def spent(self) -> dict[Phase, float]:
        """Return the GPU's seconds in each phase so far, estimated from the steps that were timed."""
        means = self._read()
        for phase, seconds in means.items():
            self._totals[phase] += seconds * self._steps_since
        if means:
            self._steps_since = 0
        return dict(self._totals)

    def _read(self) -> dict[Phase, float]:
        """Return the mean seconds by phase of the timed steps that the GPU has done; nothing where there is none."""
        done: list[list[_Mark]] = []
        while self._timed and self._timed[0][-1][1].query():  # type: ignore[no-untyped-call]
            done.append(self._timed.popleft())
        # The first one has found the GPU idle, as it had been waited for.
        counted = done[1:] or done
        means: dict[Phase, float] = {}
        for marks in counted:
            for (phase, start), (_, end) in pairwise(marks):
                means[phase] = means.get(phase, 0.0) + start.elapsed_time(end) / 1e3 / len(counted)
        return means
