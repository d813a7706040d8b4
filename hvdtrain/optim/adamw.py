"""AdamW: Adam with decoupled weight decay (arXiv:1711.05101)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from hvdtrain.settings import OptimConfig, setting

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class AdamWConfig(OptimConfig):
    """AdamW and its learning-rate schedule."""

    beta1: float = setting(0.9, minimum=0, below=1)
    """AdamW: decay of the first moment."""
    beta2: float = setting(0.95, minimum=0, below=1)
    """AdamW: decay of the second moment."""
    eps: float = setting(1e-8, minimum=0)
    """AdamW: added to the denominator."""
    kernel: Literal["fused", "foreach", "loop"] = setting("fused", changeable=True)
    """AdamW: one kernel for all weights, several, or one for each."""

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return the optimizer over the model's trainable parameters."""
        from hvdtrain.optim.groups import trainable

        return build_adamw(self, model, trainable(model))


def build_adamw(optim: AdamWConfig, model: nn.Module, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Return AdamW over some of the model's parameters."""
    import torch

    from hvdtrain.optim.groups import decay_groups

    # torch's fused kernel takes no complex numbers.
    is_fused = optim.kernel == "fused" and not any(parameter.is_complex() for parameter in model.parameters())
    return torch.optim.AdamW(
        decay_groups(model, parameters, optim.weight_decay),
        lr=optim.peak_lr,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        fused=is_fused,
        foreach=None if is_fused else optim.kernel == "foreach",
    )
