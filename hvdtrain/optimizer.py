"""Build the optimizer that a configuration asks for."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hvdtrain.config import OptimConfig


def build_optimizer(optim: OptimConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer over the model's trainable parameters, matrices decayed and vectors not.

    Norm gains and biases (fewer than two dimensions) are left out of weight decay, as is usual for transformers.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if optim.name == "sgd":
        return torch.optim.SGD(groups, lr=optim.peak_lr, momentum=optim.momentum)
    return torch.optim.AdamW(groups, lr=optim.peak_lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)
