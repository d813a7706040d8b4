"""`--health.noise-scale`: the gradient noise scale of a training between ranks, and how far their gradients agree."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from hvdtrain.optim.noise import Norms, agreement, estimate
from hvdtrain.trainer.component import Component, Step
from hvdtrain.trainer.job import Job

if TYPE_CHECKING:
    from hvdtrain.trainer.state import Training


class NoiseScale(Component):
    """Compares the ranks' own gradients with their mean (arXiv:1812.06162, appendix A.1), in steps of full batches."""

    name = "noise_scale"
    wrap_options: Mapping[str, Any] = {"has_square": True}

    def __init__(self, job: Job) -> None:
        self._size, self._batch = job.world.size, job.plan.global_batch_size
        if self._size == 1:
            self.about = "--health.noise-scale logs nothing here: it compares the gradients of several ranks"
        # Mean squared norm of the ranks' own gradients, squared norm of their mean, and the number of steps.
        self._sums = torch.zeros(3, dtype=torch.float64, device=job.world.device)

    @classmethod
    def of(cls, job: Job) -> NoiseScale | None:
        """Return one where it is asked for."""
        return cls(job) if job.config.health.noise_scale else None

    def after_update(self, training: Training, step: Step) -> None:
        """Add the norms of a full batch."""
        square = training.optimizer.mean_square
        if square is None or step.num_samples < self._batch:
            return
        # The ranks have sent scaled gradients; the norm is of the unscaled ones.
        square = square / step.loss_scale**2
        norms = torch.stack([square, step.grad_norm.double().square(), torch.ones_like(square)])
        self._sums += norms.where(step.is_finite, 0)

    def metrics(self, training: Training) -> dict[str, float]:
        """Return the noise scale in samples, and the mean agreement of two ranks' gradients."""
        small, large, count = self._sums.tolist()
        self._sums.zero_()
        if count == 0:
            return {}
        norms = Norms(small / count, large / count)
        signal, variance = estimate([norms], self._batch / self._size, self._batch)
        noise = variance / signal if signal > 0 else math.inf
        return {"train/noise_scale": noise, "train/gradient_agreement": agreement(norms, self._size)}

    def state_dict(self) -> dict[str, Any]:
        """Return the sums, and of how many ranks they are."""
        return {"sums": self._sums, "ranks": self._size}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the sums up again; of another number of ranks each had another part of the batch, and they are over."""
        if state.get("ranks", self._size) == self._size > 1:
            self._sums.copy_(state["sums"])
