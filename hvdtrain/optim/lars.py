"""LARS: SGD whose rate is each layer's own, for large batches (arXiv:1708.03888)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hvdtrain.settings import OptimConfig, setting

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class LarsConfig(OptimConfig):
    """LARS and its learning-rate schedule."""

    name: str = "lars"
    """The optimizer; see --optim.name of any recipe for the others."""
    momentum: float = setting(0.9, minimum=0, below=1)
    """LARS: momentum."""
    trust: float = setting(0.001, above=0)
    """LARS: a layer moves by this share of its own size, times the learning rate."""

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return the optimizer over the model's trainable parameters."""
        from hvdtrain.optim.groups import decay_groups, trainable
        from hvdtrain.optim.layerwise import Lars

        groups = decay_groups(model, trainable(model), self.weight_decay)
        return Lars(groups, lr=self.peak_lr, momentum=self.momentum, trust=self.trust)
