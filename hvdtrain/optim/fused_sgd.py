"""SGD in one pass over memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hvdtrain.optim.closures import loss_of
from hvdtrain.optim.private_optimizer import add_all_, fused_sgd_


class SGD(torch.optim.SGD):
    """torch's SGD for dense gradients, whose steps take one pass over memory.

    torch's own takes one for each of decay, momentum, the look ahead and the update. Its fused one begins the momentum
    of all parameters in the first step: it fails where one gets its first gradient later, and goes on with what was
    never written where the first step was skipped. Here momentum begins as zeros. Of weights in 16 bits on CPUs torch's
    leaves some where they are: `private_optimizer.fused_sgd_`.

    Args:
        params: parameters or groups.
        lr: learning rate.
        momentum: 0 for none.
        nesterov: look one step ahead.
    """

    def __init__(self, params: Any, lr: float, momentum: float = 0.0, nesterov: bool = False) -> None:
        super().__init__(params, lr=lr, momentum=momentum, nesterov=nesterov, fused=True)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step; returns what `closure` does."""
        loss = loss_of(closure)
        with torch.no_grad():
            for group in self.param_groups:
                self._move(group)
        return loss

    def _move(self, group: dict[str, Any]) -> None:
        moved = [parameter for parameter in group["params"] if parameter.grad is not None]
        if not moved:  # its layers are frozen, or other ranks have them
            return
        # By torch's loss scaler, and by the trainer on GPUs.
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if not (group["momentum"] or group["weight_decay"]) and scale is None and found_inf is None:
            add_all_(moved, [parameter.grad for parameter in moved], alpha=-group["lr"])
            return
        kinds: dict[Any, list[nn.Parameter]] = defaultdict(list)
        for parameter in moved:
            kinds[parameter.dtype, parameter.device].append(parameter)
        for alike in kinds.values():
            buffers = [_real(self._momentum_of(parameter)) for parameter in alike] if group["momentum"] else []
            gradients = [_real(_laid_out_as(parameter)) for parameter in alike]
            fused_sgd_([_real(parameter) for parameter in alike], gradients, buffers, group, scale, found_inf)

    def _momentum_of(self, parameter: nn.Parameter) -> Tensor:
        state = self.state[parameter]
        if state.get("momentum_buffer") is None:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer: Tensor = state["momentum_buffer"]
        return buffer


def _laid_out_as(parameter: nn.Parameter) -> Tensor:
    """Return a parameter's gradient as it lies in memory itself: the kernel goes through both as they lie there."""
    gradient = parameter.grad
    assert gradient is not None
    return gradient if gradient.stride() == parameter.stride() else torch.empty_like(parameter).copy_(gradient)


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
