"""Means of the metrics over the steps since the last line of the log."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hvdtrain.trainer.component import Component, Step
from hvdtrain.trainer.job import Job
from hvdtrain.trainer.rank_figures import RankFigures, start_sums_and_figures

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
        self._is_counted = job.world.rank == 0  # targets are known to all ranks, and to be counted once
        self._on_device = torch.zeros(len(self._names) + 1, dtype=torch.float64, device=job.world.device)
        self._on_host = [0.0] * (len(self._names) + 1)
        """In host memory nothing waits for a device: there these are the totals, and the others stay 0."""
        self._last: Step | None = None
        self._under_way: Callable[[], tuple[list[float], list[RankFigures]]] | None = None
        self._own: dict[str, float] = {}
        """What a line that has been begun says of this rank's last step."""
        self.loss = math.nan
        """The mean of the last line, alike on all ranks."""

    def after_update(self, training: Training, step: Step) -> None:
        """Add the step, unless it was skipped."""
        self._last = step
        num_targets = step.num_targets if self._is_counted else 0
        if isinstance(step.totals, Tensor):
            # Not by `+=`, which would copy what it has added to onto itself.
            self._on_device[:-1].add_(step.totals.where(step.is_finite, 0))
            self._on_device[-1].add_(step.is_finite, alpha=num_targets)
        elif step.is_finite:
            self._on_host = [a + b for a, b in zip(self._on_host, (*step.totals, num_targets), strict=True)]

    def _totals(self) -> Tensor:
        """Return the sums and the number of targets, float64 `(len(metrics) + 1,)`."""
        totals = self._on_device.clone()
        if any(self._on_host):  # never of a GPU, which would be waited for
            totals += torch.tensor(self._on_host, dtype=torch.float64, device=self._world.device)
        return totals

    def _set(self, totals: Tensor) -> None:
        if self._world.reads_at_once:
            self._on_host = totals.tolist()
        else:
            self._on_device.copy_(totals)

    def start_line(self, training: Training) -> None:
        """Send the sums of this window, and what the rank tells of its steps' time, and begin another. Collective."""
        self._under_way = self._start(training)

    def _start(self, training: Training) -> Callable[[], tuple[list[float], list[RankFigures]]]:
        wait = start_sums_and_figures(self._world, self._totals(), training.figures)
        self._own = {"train/lr": training.rates.rate}
        if self._last is not None:
            self._own["train/grad_norm"] = float(self._last.grad_norm)
        self._set(torch.zeros_like(self._on_device))
        return wait

    def metrics(self, training: Training) -> dict[str, float]:
        """Return the means, and rate and gradient norm of the last step before `start_line`. Collective."""
        wait, self._under_way = self._under_way or self._start(training), None
        (*sums, num_targets), training.ranks = wait()
        metrics: dict[str, float] = {}
        if num_targets:
            metrics = {f"train/{name}": total / num_targets for name, total in zip(self._names, sums, strict=True)}
        self.loss = metrics.get("train/loss", math.nan)
        return {**metrics, **self._own}

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's sums."""
        return {"totals": self._totals()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the sums up again, so that the next means are bitwise the same."""
        self._set(state["totals"])

    def redistribute(self, states: Sequence[Mapping[str, Any]], rank: int) -> Mapping[str, Any] | None:
        """Give all to rank 0."""
        return {"totals": torch.stack([state["totals"] for state in states]).sum(0)} if rank == 0 else None
