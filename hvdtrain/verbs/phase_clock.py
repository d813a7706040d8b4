"""Where a step's time goes, from what the training loop notes for the heartbeat; and the time of a single call."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from hvdtrain.process.progress import Phase, Progress
from hvdtrain.trainer.device_clock import finish


class PhaseClock(Progress):
    """Adds up the seconds spent in each phase; "rest" is what lies between them.

    A GPU finishes its work at each change of phase, so that the parts are its own times. That takes away overlap:
    measure the whole without.

    Args:
        device: where the model is.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self._phase: str = "rest"
        self._since = time.perf_counter()
        self._seconds: dict[str, float] = defaultdict(float)
        self.began: dict[str, float] = {}
        """When each phase last began, by `time.perf_counter`."""

    def enter(self, phase: Phase) -> None:
        """Note the phase, and what the one before has taken."""
        self._turn(phase)
        super().enter(phase)

    def begin_step(self, step: int) -> None:
        """Note a new step; what comes before its first phase is the rest."""
        self._turn("rest")
        super().begin_step(step)

    def take(self) -> dict[str, float]:
        """Return the seconds of each phase since the last call; the one that goes on counts so far."""
        self._turn(self._phase)
        seconds = dict(self._seconds)
        self._seconds.clear()
        return seconds

    def _turn(self, phase: str) -> None:
        finish(self._device)
        now = time.perf_counter()
        self._seconds[self._phase] += now - self._since
        self._phase, self._since = phase, now
        self.began[phase] = now


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds of one call, the device's work included."""
    started = time.perf_counter()
    call()
    finish(device)
    return time.perf_counter() - started
