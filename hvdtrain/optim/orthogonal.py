"""The optimizer Muon, for all matrices of one shape at once, in a precision that the device is fast in."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from hvdtrain.optim.closures import loss_of

_NAME = "momentum_buffer"  # as in torch.optim.Muon
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_SMALLEST_NORM = 1e-7


class Muon(torch.optim.Optimizer):
    """Momentum whose updates are made orthogonal (Jordan et al. 2024, "Muon: An optimizer for hidden layers").

    `torch.optim.Muon` takes matrix by matrix and computes in bfloat16, which most CPUs have to imitate: there it takes
    several times as long as forward and backward. Here matrices of one shape are one batch of products: on GPUs in
    bfloat16, on CPUs in fp32, or in bfloat16 where the training is (`multiply_in_bf16`), whatever the CPU, so that
    ranks on unlike hosts stay equal. fp64 is kept.

    Args:
        params: matrices, `(M, N)` each.
        lr: learning rate; updates are scaled to the size of AdamW's, by `0.2 sqrt(max(M, N))` (arXiv:2502.16982,
            section 2.2), so that one rate serves both.
        weight_decay: decoupled: a parameter shrinks by lr * weight_decay in each step.
        momentum: of the exponential mean of gradients, which looks ahead (Nesterov).
    """

    _on_cpus = torch.float32  # of the class: torch's copies of an optimizer keep no attributes

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0, momentum: float = 0.95
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Move the parameters that have gradients."""
        loss = loss_of(closure)
        for group in self.param_groups:
            alike: dict[tuple[torch.Size, torch.dtype, torch.device], list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike[parameter.shape, parameter.dtype, parameter.device].append(parameter)
            for parameters in alike.values():
                self._move(parameters, **group)
        return loss

    def _move(self, parameters: list[Tensor], lr: float, weight_decay: float, momentum: float, **others: Any) -> None:
        """Move parameters of one shape."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]  # all have one
        for parameter in parameters:
            if _NAME not in self.state[parameter]:
                self.state[parameter][_NAME] = torch.zeros_like(parameter)
        means = [self.state[parameter][_NAME] for parameter in parameters]
        torch._foreach_lerp_(means, gradients, 1 - momentum)
        looking_ahead = torch.stack(torch._foreach_lerp(gradients, means, momentum))
        updates = orthogonal(looking_ahead, torch.bfloat16 if looking_ahead.is_cuda else self._on_cpus)
        scale = 0.2 * max(parameters[0].shape) ** 0.5
        torch._foreach_mul_(parameters, 1 - lr * weight_decay)
        torch._foreach_add_(parameters, list(updates.to(parameters[0].dtype)), alpha=-lr * scale)


def multiply_in_bf16(optimizer: torch.optim.Optimizer) -> None:
    """Have Muon, if it is or has one, multiply in bfloat16 on CPUs, too: for trainings that do."""
    for part in getattr(optimizer, "parts", [optimizer]):
        if isinstance(part, Muon):
            part._on_cpus = torch.bfloat16


def orthogonal(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Return about `U V^T` of each matrix `U S V^T`, `(K, M, N)`: its singular values lie between about 0.5 and 1.5.

    By iterations of a polynomial of fifth degree, `X <- a X + (b X X^T + c (X X^T)^2) X`, which needs products only
    (Jordan et al. 2024). Rows are the shorter side in it. Products are in this type; fp64 is kept.
    """
    a, b, c = _COEFFICIENTS
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    if x.dtype != torch.float64:
        x = x.to(dtype)
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=_SMALLEST_NORM)  # no value is above 1 now
    for _ in range(_ITERATIONS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x
