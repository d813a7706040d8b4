"""Loss scaling for fp16, whose small gradients would be rounded to zero otherwise (arXiv:1710.03740, section 3.2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler  # of torch.amp, where torch 2.12 does not say that it exports it

from hvdtrain.errors import ConfigError
from hvdtrain.optim.private_optimizer import tell_scaler
from hvdtrain.trainer.component import Component, Step
from hvdtrain.trainer.job import Job

if TYPE_CHECKING:
    from hvdtrain.trainer.state import Training


class LossScaler(Component):
    """Multiplies the loss, divides the gradients, and moves the factor by whether they were finite: torch's own."""

    name = "loss_scaler"

    def __init__(self, device: torch.device) -> None:
        self._scaler = GradScaler(device.type)
        self._one = torch.ones((), device=device)

    @classmethod
    def of(cls, job: Job) -> LossScaler | None:
        """Return one for `--train.precision fp16`."""
        return cls(job.world.device) if job.config.train.precision == "fp16" else None

    def begin(self, model: nn.Module) -> None:
        """Refuse what torch's scaler cannot divide."""
        name = next((name for name, p in model.named_parameters() if p.is_complex() and p.requires_grad), None)
        if name is not None:
            raise ConfigError(
                f"--train.precision fp16 needs a loss scaler, and torch's takes no complex numbers, as in {name} of the"
                " model: use --train.precision bf16"
            )

    @property
    def scale(self) -> float:
        """Return the factor; on a GPU, this waits for it."""
        return self._scaler.get_scale()

    def before_backward(self, loss: Tensor) -> Tensor:
        """Return the scaled loss."""
        scaled: Tensor = self._scaler.scale(loss)
        return scaled

    def after_backward(self, training: Training, step: Step) -> None:
        """Divide the averaged gradients by the factor."""
        step.loss_scale = self._scaler.scale(self._one)
        self._scaler.unscale_(training.optimizer)

    def after_update(self, training: Training, step: Step) -> None:
        """Move the factor, on all ranks alike: by the norm, not by the gradients that this rank happens to have."""
        tell_scaler(self._scaler, training.optimizer, ~step.grad_norm.isfinite())
        self._scaler.update()

    def metrics(self, training: Training) -> dict[str, float]:
        """Return the factor."""
        return {"train/loss_scale": self.scale}

    def note_on_skip(self) -> str:
        """Say the new factor."""
        return f"; the loss scale is now {self.scale:g}"

    def state_dict(self) -> dict[str, Any]:
        """Return torch's own state."""
        return self._scaler.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load torch's own state."""
        self._scaler.load_state_dict(dict(state))
