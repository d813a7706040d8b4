"""`--eval.patience`: the run ends when the held-out loss has not come down for so many evaluations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hvdtrain.trainer.component import Component
from hvdtrain.trainer.job import Job

if TYPE_CHECKING:
    from hvdtrain.trainer.state import Training


class EarlyStopping(Component):
    """Counts evaluations since the lowest held-out loss; alike on all ranks, since they evaluate together."""

    name = "early_stopping"

    def __init__(self, patience: int) -> None:
        self._patience = patience
        self._best, self._num_since = math.inf, 0
        self.about = f"patience:   ends after {patience} evaluations without a lower held-out loss (--eval.patience)"

    @classmethod
    def of(cls, job: Job) -> EarlyStopping | None:
        """Return one where `--eval.patience` is given."""
        return None if job.config.eval.patience is None else cls(job.config.eval.patience)

    def after_evaluation(self, training: Training, metrics: Mapping[str, float]) -> None:
        """Count; a loss that is not a number is no lower one."""
        loss = metrics["val/loss"]
        is_lower = loss < self._best
        self._best, self._num_since = (loss, 0) if is_lower else (self._best, self._num_since + 1)

    def reason_to_end(self) -> str:
        """Return the reason when patience is at its end. With more patience the same run goes on."""
        if self._num_since < self._patience:
            return ""
        return f"no lower held-out loss than {self._best:.4g} in {self._num_since} evaluations (--eval.patience)"

    def state_dict(self) -> dict[str, Any]:
        """Return the lowest loss and the number of evaluations since."""
        return {"best": self._best, "num_since": self._num_since}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting."""
        self._best, self._num_since = float(state["best"]), int(state["num_since"])
