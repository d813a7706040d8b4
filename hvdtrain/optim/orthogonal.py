"""Muon's step, for all matrices of one shape at once, in a precision that the device is fast in."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_NAME = "momentum_buffer"


class BatchedMuon(torch.optim.Muon):
    """torch's Muon with another way of computing its orthogonal updates; settings and state are torch's.

    torch takes matrix by matrix and computes in bfloat16, which most CPUs have to imitate: there it takes several times
    as long as forward and backward. Here matrices of one shape are one batch of products, in bfloat16 on GPUs and in
    fp32 on CPUs, whatever the CPU, so that ranks on unlike hosts stay equal; fp64 is kept.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Move the parameters that have gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            alike: dict[tuple[torch.Size, torch.dtype, torch.device], list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike[parameter.shape, parameter.dtype, parameter.device].append(parameter)
            for parameters in alike.values():
                self._move(parameters, group)
        return loss

    def _move(self, parameters: Sequence[Tensor], group: dict[str, Any]) -> None:
        """Move parameters of one shape, `(M, N)`."""
        gradients = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            if _NAME not in self.state[parameter]:
                self.state[parameter][_NAME] = torch.zeros_like(parameter)
        velocities = [self.state[parameter][_NAME] for parameter in parameters]
        torch._foreach_lerp_(velocities, gradients, 1 - group["momentum"])
        directions = torch._foreach_lerp(gradients, velocities, group["momentum"]) if group["nesterov"] else velocities
        updates = orthogonal(torch.stack(list(directions)), group["ns_coefficients"], group["ns_steps"], group["eps"])
        rows, columns = parameters[0].shape
        rate = group["lr"] * _scale(rows, columns, group["adjust_lr_fn"])
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, list(updates.to(parameters[0].dtype)), alpha=-rate)


def orthogonal(matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Return about `U V^T` of each matrix `U S V^T`, `(K, M, N)`: its singular values lie between about 0.5 and 1.5.

    By iterations of a polynomial of fifth degree, `X <- a X + (b X X^T + c (X X^T)^2) X`, which needs products only
    (Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"). Columns are the longer side in it.
    """
    a, b, c = coefficients
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    if x.dtype != torch.float64:
        x = x.bfloat16() if x.is_cuda else x.float()
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=eps)  # singular values are at most 1
    for _ in range(steps):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def _scale(rows: int, columns: int, rule: str | None) -> float:
    """Return the factor of the learning rate, for torch's names of the rules."""
    if rule == "match_rms_adamw":
        return float(0.2 * max(rows, columns) ** 0.5)
    return max(1.0, rows / columns) ** 0.5
