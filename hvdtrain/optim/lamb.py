"""LAMB: Adam whose rate is each layer's own, for large batches (arXiv:1904.00962)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hvdtrain.settings import OptimConfig, setting

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class LambConfig(OptimConfig):
    """LAMB and its learning-rate schedule."""

    name: str = "lamb"
    """The optimizer; see --optim.name of any recipe for the others."""
    beta1: float = setting(0.9, minimum=0, below=1)
    """LAMB: decay of the first moment."""
    beta2: float = setting(0.999, minimum=0, below=1)
    """LAMB: decay of the second moment."""
    eps: float = setting(1e-6, minimum=0)
    """LAMB: added to the denominator."""

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return the optimizer over the model's trainable parameters."""
        from hvdtrain.optim.groups import decay_groups, trainable
        from hvdtrain.optim.layerwise import Lamb

        groups = decay_groups(model, trainable(model), self.weight_decay)
        return Lamb(groups, lr=self.peak_lr, betas=(self.beta1, self.beta2), eps=self.eps)
