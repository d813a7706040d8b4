"""Means of the metrics over the steps since the last line of the log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from hvdtrain.trainer.component import Component, Step
from hvdtrain.trainer.job import Job

if TYPE_CHECKING:
    from hvdtrain.trainer.state import Training


class MetricWindow(Component):
    """Adds up each rank's sums of `Task.metrics`, and on rank 0 the number of targets, of steps that count.

    Sums and counts are added over ranks and steps before they are divided: never a mean of means.
    """

    name = "window"
    is_replicated = False

    def __init__(self, job: Job) -> None:
        self._world, self._names = job.world, job.task.metrics
        self._totals = torch.zeros(len(self._names) + 1, dtype=torch.float64, device=job.world.device)
        self._last: Step | None = None

    def after_update(self, training: Training, step: Step) -> None:
        """Add the step, unless it was skipped."""
        self._totals[:-1] += step.sums.where(step.is_finite, 0)
        if self._world.rank == 0:  # known to all ranks, and to be counted once
            self._totals[-1] += step.is_finite * step.num_targets
        self._last = step

    def metrics(self, training: Training) -> dict[str, float]:
        """Return the means, the learning rate and the gradient norm of the last step, and begin a new window."""
        *sums, num_targets = self._world.all_reduce(self._totals, "sum", "train.metrics").tolist()
        metrics: dict[str, float] = {}
        if num_targets:
            metrics = {f"train/{name}": total / num_targets for name, total in zip(self._names, sums, strict=True)}
        metrics["train/lr"] = training.optimizer.param_groups[0]["lr"]
        if self._last is not None:
            metrics["train/grad_norm"] = float(self._last.grad_norm)
        self._totals.zero_()
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's sums."""
        return {"totals": self._totals}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the sums up again, so that the next means are bitwise the same."""
        self._totals.copy_(state["totals"])

    def redistribute(self, states: Sequence[Mapping[str, Any]], rank: int) -> Mapping[str, Any] | None:
        """Give all to rank 0."""
        return {"totals": torch.stack([state["totals"] for state in states]).sum(0)} if rank == 0 else None
