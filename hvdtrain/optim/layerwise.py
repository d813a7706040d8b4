"""Optimizers with a rate for each layer, for large batches: LARS and LAMB.

torch has neither. Both multiply a layer's step by how large its weights are beside it, so that no layer moves by more
than its share. Norms and biases, which are not decayed, take the plain step: their own size says nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hvdtrain.optim.closures import loss_of


class _Layerwise(torch.optim.Optimizer):
    """What both share: a step that calls `_move` for each parameter with a gradient."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Take a step; returns what `closure` does."""
        loss = loss_of(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group, self.state[parameter])
        return loss

    def _move(self, weight: Tensor, gradient: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        raise NotImplementedError


class Lars(_Layerwise):
    """SGD with layer-wise adaptive rates (arXiv:1708.03888, algorithm 1).

        ratio = trust |w| / (|g| + decay |w|),  m = momentum m + lr ratio (g + decay w),  w = w - m

    Args:
        params: parameters or groups; in groups with `weight_decay` 0 the ratio is 1.
        lr: global rate.
        momentum: of the steps.
        weight_decay: beta of the paper.
        trust: eta of the paper.
    """

    def __init__(
        self, params: Any, lr: float, momentum: float = 0.9, weight_decay: float = 0.0, trust: float = 0.001
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust})

    def _move(self, weight: Tensor, gradient: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        decay, rate = group["weight_decay"], group["lr"]
        if decay:
            size, slope = weight.norm(), gradient.norm()
            ratio = group["trust"] * size / (slope + decay * size)
            rate *= torch.where((size > 0) & (slope > 0), ratio, torch.ones_like(ratio))
            gradient = gradient.add(weight, alpha=decay)
        step = gradient * rate
        if group["momentum"]:
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(weight)
            step = state["momentum_buffer"].mul_(group["momentum"]).add_(step)
        weight.sub_(step)


class Lamb(_Layerwise):
    """Adam with layer-wise adaptive rates (arXiv:1904.00962, algorithm 2, with Adam's correction of the bias).

        r = m / (sqrt(v) + eps) + decay w,  w = w - lr (|w| / |r|) r

    Args:
        params: parameters or groups; in groups with `weight_decay` 0 the ratio is 1.
        lr: global rate.
        betas: decays of the moments.
        eps: added to the denominator.
        weight_decay: lambda of the paper.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def _move(self, weight: Tensor, gradient: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        if not state:
            state.update(step=torch.zeros(()), exp_avg=torch.zeros_like(weight), exp_avg_sq=torch.zeros_like(weight))
        (beta1, beta2), decay = group["betas"], group["weight_decay"]
        state["step"] += 1
        number = float(state["step"])
        first = state["exp_avg"].lerp_(gradient, 1 - beta1) / (1 - beta1**number)
        second = state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2) / (1 - beta2**number)
        step = first / (second.sqrt() + group["eps"])
        rate = group["lr"]
        if decay:
            step = step.add_(weight, alpha=decay)
            size, length = weight.norm(), step.norm()
            rate *= torch.where((size > 0) & (length > 0), size / length, torch.ones_like(size))
        weight.sub_(step * rate)
