"""`--optim.schedule plateau`: a learning rate that falls when evaluations bring nothing better."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hvdtrain.errors import ConfigError
from hvdtrain.trainer.component import Component

if TYPE_CHECKING:
    from hvdtrain.trainer.job import Job
    from hvdtrain.trainer.state import Training


class Plateau(Component):
    """Multiplies the learning rate by `factor` after `patience` evaluations without a lower held-out loss.

    Evaluations are alike on all ranks, and so is this.

    Args:
        factor: by what the rate is multiplied each time.
        patience: evaluations that are waited for.
    """

    name = "plateau"

    def __init__(self, factor: float, patience: int) -> None:
        self._factor, self._patience = factor, patience
        self._best, self._without, self._drops = math.inf, 0, 0

    @classmethod
    def of(cls, job: Job) -> Plateau | None:
        """Return one for the schedule plateau.

        Raises:
            ConfigError: nothing is evaluated before the end.
        """
        optim = job.config.optim
        if optim.schedule != "plateau":
            return None
        if job.config.eval.every is None:
            raise ConfigError("--optim.schedule plateau follows evaluations: give --eval.every N, steps between them")
        return cls(optim.decay_factor, optim.patience)

    def after_evaluation(self, training: Training, metrics: Mapping[str, float]) -> None:
        """Count evaluations without a lower loss; one that is not a number is none."""
        loss = metrics.get("val/loss", math.inf)
        is_better = loss < self._best
        self._without = 0 if is_better else self._without + 1
        self._best = loss if is_better else self._best
        if self._without == self._patience:
            self._without = 0
            self._drops += 1

    def lr_factor(self) -> float:
        """Return what the rate has come down to."""
        return float(self._factor**self._drops)

    def metrics(self, training: Training) -> dict[str, float]:
        """Return what the rate is multiplied by."""
        return {"train/plateau_factor": self.lr_factor()}

    def state_dict(self) -> dict[str, Any]:
        """Return what was counted."""
        return {"best": self._best, "without": self._without, "drops": self._drops}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting."""
        self._best, self._without, self._drops = float(state["best"]), int(state["without"]), int(state["drops"])
