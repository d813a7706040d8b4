"""Where a step's time goes, from the same notes that tell the heartbeat where a rank is."""

from __future__ import annotations

import time
from collections import defaultdict

import torch

from hvdtrain.process.progress import Phase, Progress

# What a person calls the phases that the training loop notes.
PARTS = ("data", "forward", "backward", "communication", "update", "rest")


class TimedProgress(Progress):
    """Adds up the seconds spent in each phase.

    Args:
        device: where the model is; with `waits`, a GPU finishes its work at each change of phase, so that the parts are
            its own times. That takes away overlap: measure the whole without.
        waits: whether to do that.
    """

    def __init__(self, device: torch.device, waits: bool) -> None:
        super().__init__()
        self._is_waiting = waits and device.type == "cuda"
        self._phase: str = "rest"
        self._since = time.perf_counter()
        self._seconds: dict[str, float] = defaultdict(float)

    def enter(self, phase: Phase) -> None:
        """Note the phase, and what the one before has taken."""
        self._turn(phase)
        super().enter(phase)

    def begin_step(self, step: int) -> None:
        """Note a new step; what comes before its first phase is the rest."""
        self._turn("rest")
        super().begin_step(step)

    def take(self) -> dict[str, float]:
        """Return the seconds of each part since the last call."""
        self._turn(self._phase)
        seconds = {part: self._seconds.get(part, 0.0) for part in PARTS}
        self._seconds.clear()
        return seconds

    def _turn(self, phase: str) -> None:
        if self._is_waiting:
            torch.cuda.synchronize()
        now = time.perf_counter()
        self._seconds[self._phase] += now - self._since
        self._phase, self._since = phase, now
