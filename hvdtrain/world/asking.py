"""The question that ranks answer in every step, and what becomes of it where steps average nothing."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hvdtrain.world.question import ask_with_gradients

if TYPE_CHECKING:
    from hvdtrain.world.world import World
    from hvdtrain.world.wrapped import WrappedOptimizer

# An answer is read at most so many steps, or seconds, after its question.
MOST_STEPS, MOST_SECONDS = 16, 1.0
# So many seconds, or steps, lie between an answer and the next question: while one is on its way, Horovod looks for
# messages, and takes processor time from training.
MOST_STEPS_BETWEEN, SECONDS_BETWEEN = 16, 0.5
# Waiting for so small a share of a step is none.
_NO_WAIT = 0.05


class Asking:
    """Asks all ranks again and again whether any of them says yes; all hear it after the same step.

    Where gradients are averaged in each step, the answer is there after the step. Where ranks train apart, a message
    of a few bytes may take longer than a step: then a question is on its way for several steps, as many as all ranks
    have agreed on with the one before, so that no step waits for it.

    Args:
        world: the ranks.
        optimizer: its averages carry the question, where it has any.
        name: of the collectives.
        clock: in seconds.
    """

    def __init__(
        self,
        world: World,
        optimizer: WrappedOptimizer,
        name: str = "stop",
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._world, self._optimizer, self._name, self._clock = world, optimizer, name, clock
        self._is_rare = world.size > 1 and optimizer.question is None
        self._answer: Callable[[], bool] | None = None
        self._wait: Callable[[], Tensor] | None = None
        self._asked = self._stepped = 0.0
        self._fastest = math.inf
        """Seconds of the fastest step since the question: others may have averaged, or saved."""
        self.steps = 1
        """From a question to its answer; alike on all ranks."""
        self._wanted = 1
        self._between = 0
        self._left = self._until_next = 0

    def ask(self, own: bool, busy_steps: int = 0) -> None:
        """Say before a step what this rank answers. Collective.

        Args:
            own: the answer.
            busy_steps: for so many steps the wire may be taken by what was sent before; alike on all ranks. Where
                answers are late, this one is not waited for meanwhile.
        """
        if not self._is_rare:
            self._answer = ask_with_gradients(self._world, self._optimizer, own, self._name)
        elif self._until_next:
            self._until_next -= 1
        elif self._wait is None:
            message = torch.tensor([float(own), self._wanted, -self._between], dtype=torch.float32, device="cpu")
            self._wait = self._world.start_all_reduce(message, "max", self._name)
            self._left, self._fastest = max(self.steps, busy_steps), math.inf
            self._asked = self._clock()
        self._stepped = self._clock()

    def answer(self) -> bool:
        """Return after the step whether any rank has said yes, as far as that is to be known by now. Collective."""
        if self._answer is not None:
            return self._answer()
        self._left -= 1
        began = self._clock()
        self._fastest = min(self._fastest, began - self._stepped)
        if self._wait is None or self._left > 0:
            return False
        is_yes, steps, between = self._wait().tolist()
        self._wait = None
        now = self._clock()
        self._wanted = wanted_steps(self.steps, self._fastest, now - began, now - self._asked)
        self._between = min(MOST_STEPS_BETWEEN, int(SECONDS_BETWEEN / max(self._fastest, 1e-9)))
        self.steps, self._until_next = int(steps), int(-between)
        return bool(is_yes)

    def close(self) -> None:
        """Wait for an answer that is still to come. Collective."""
        if self._wait is not None:
            self._wait()
            self._wait = None


def wanted_steps(steps: int, a_step_s: float, waited_s: float, latency_s: float) -> int:
    """Return by how many steps a question is hidden.

    Args:
        steps: that there were since it was asked.
        a_step_s: seconds of the fastest of these.
        waited_s: seconds for which its answer was waited for then.
        latency_s: seconds from the question to the answer.
    """
    a_step_s = max(a_step_s, 1e-9)
    wanted = steps if waited_s < _NO_WAIT * a_step_s else math.ceil(latency_s / a_step_s) + 1
    return max(1, min(wanted, MOST_STEPS, int(MOST_SECONDS / a_step_s)))
