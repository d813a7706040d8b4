"""Stochastic gradient descent, with momentum if it is given."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hvdtrain.settings import OptimConfig, setting

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class SgdConfig(OptimConfig):
    """SGD and its learning-rate schedule."""

    name: str = "sgd"
    """The optimizer; see --optim.name of any recipe for the others."""
    momentum: float = setting(0.0, minimum=0, below=1)
    """SGD: momentum."""
    nesterov: bool = False
    """SGD: Nesterov's momentum, which looks one step ahead."""

    def unused(self) -> Iterator[tuple[str, str]]:
        """Yield what needs momentum."""
        yield from super().unused()
        if not self.momentum:
            yield "nesterov", "it is a kind of momentum: give --optim.momentum"

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return the optimizer over the model's trainable parameters."""
        import torch

        from hvdtrain.optim.fused_sgd import SGD
        from hvdtrain.optim.groups import decay_groups, sparse_weights, trainable

        groups = decay_groups(model, trainable(model), self.weight_decay)
        kind = torch.optim.SGD if sparse_weights(model) else SGD
        return kind(groups, lr=self.peak_lr, momentum=self.momentum, nesterov=self.nesterov and self.momentum > 0)
