"""What a rank is doing right now, for those who watch over it, and where its time has gone. Standard library only."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple, get_args

from hvdtrain.process.forked import Original

Phase = Literal[
    "start",
    "resume",
    "data",
    "forward",
    "compilation",
    "backward",
    "update",
    "between steps",
    "communication",
    "evaluation",
    "saving",
    "end",
]


class Place(NamedTuple):
    """Where a rank is."""

    step: int | None
    """Optimizer steps completed; None before and after training."""
    phase: Phase
    age_s: float
    """Seconds since it got there."""

    def __str__(self) -> str:
        return self.phase if self.step is None else f"step {self.step}, {self.phase}"


class Progress:
    """Written by the thread that trains, read by any other."""

    def __init__(self) -> None:
        # One tuple, replaced as a whole: a reader never sees half of a change.
        self._place: tuple[int | None, Phase, float] = (None, "start", time.monotonic())
        self._worked = 0.0
        self._original = Original()
        self._spent: dict[Phase, float] = dict.fromkeys(get_args(Phase), 0.0)

    def enter(self, phase: Phase) -> None:
        """Note that this rank makes progress: also with the same phase again."""
        self._move(self._place[0], phase)

    def begin_step(self, step: int) -> None:
        """Note that `step` optimizer steps are completed and the next one begins."""
        self._move(step, "data")

    def spent(self) -> dict[Phase, float]:
        """Return the seconds spent in each phase so far; to be called by the thread that trains."""
        self._move(*self._place[:2])
        return dict(self._spent)

    def _move(self, step: int | None, phase: Phase) -> None:
        self._original.check()
        _, before, since = self._place
        now = time.monotonic()
        self._spent[before] += now - since
        self._place = (step, phase, now)

    def note_work(self) -> None:
        """Note that this process works, where no step tells of progress. Any thread may call it."""
        self._worked = time.monotonic()

    def leave(self) -> None:
        """Note that training is over."""
        self._move(None, "end")

    @contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """Be in a phase for a while, and then in the one before."""
        before = self._place[1]
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    def read(self) -> Place:
        """Return where this rank is."""
        step, phase, since = self._place
        if step is None:
            since = max(since, self._worked)
        return Place(step, phase, time.monotonic() - since)
