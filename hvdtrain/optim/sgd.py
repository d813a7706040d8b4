"""Stochastic gradient descent, with momentum if it is given."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
        """Return the optimizer over the model's trainable parameters.

        With momentum it is torch's fused one: a pass over memory instead of one for each of decay, momentum, the look
        ahead and the update.
        """
        import torch

        from hvdtrain.optim.groups import decay_groups, sparse_weights, trainable

        parameters = trainable(model)
        groups = decay_groups(model, parameters, self.weight_decay)
        is_nesterov = self.nesterov and self.momentum > 0
        # Neither sparse nor complex gradients can be taken by it.
        is_fused = self.momentum > 0 and not sparse_weights(model) and all(p.is_floating_point() for p in parameters)
        optimizer = torch.optim.SGD(
            groups, lr=self.peak_lr, momentum=self.momentum, nesterov=is_nesterov, fused=is_fused
        )
        if is_fused:
            optimizer.register_step_pre_hook(_begin_momentum)
        return optimizer


def _begin_momentum(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Have a momentum of zeros wherever a gradient comes for the first time.

    torch's fused step begins it for all parameters at once, in the first step: it fails where one gets its first
    gradient later, and goes on with what was never written where the first step was skipped.
    """
    import torch

    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None and "momentum_buffer" not in (state := optimizer.state[parameter]):
                state["momentum_buffer"] = torch.zeros_like(parameter)
