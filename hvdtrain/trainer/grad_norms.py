"""`--log.grad-norms`: the Euclidean norm of each layer's averaged gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hvdtrain.trainer.component import Component, Step
from hvdtrain.trainer.job import Job
from hvdtrain.world import World

if TYPE_CHECKING:
    from hvdtrain.trainer.state import Training


class GradNorms(Component):
    """Keeps the norms of the last step, before clipping, for the next line of metrics: `grad_norm/<layer>`."""

    name = "grad_norms"

    def __init__(self, world: World) -> None:
        self._world = world
        self._norms: dict[str, Tensor] = {}

    @classmethod
    def of(cls, job: Job) -> GradNorms | None:
        """Return one where `--log.grad-norms` is given."""
        return cls(job.world) if job.config.log.grad_norms else None

    @torch.no_grad()
    def after_backward(self, training: Training, step: Step) -> None:
        """Take the norms."""
        gradients: dict[str, list[Tensor]] = {}
        for name, grad in training.strategy.named_gradients(training):
            own = gradients.setdefault(layer_of(name), [])
            if grad is not None:
                own.append(grad.coalesce().values() if grad.is_sparse else grad)
        norms = training.strategy.norms_of(self._world, list(gradients.values()))
        self._norms = dict(zip(gradients, norms, strict=True))

    def metrics(self, training: Training) -> dict[str, float]:
        """Return the last step's norms."""
        return {f"grad_norm/{layer}": float(norm) for layer, norm in self._norms.items()}


def layer_of(name: str) -> str:
    """Return the layer of a parameter: up to the first number in its name, else the module that holds it.

    `blocks.3.attention.query.weight` belongs to `blocks.3`, `head.weight` to `head`.
    """
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return ".".join(parts[: number + 1] if number is not None else parts[:-1]) or name
