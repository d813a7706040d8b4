"""Cross entropy over a vocabulary, whole or in chunks that never hold all logits at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100
"""A target that is not to be predicted: it adds nothing to the loss and is not counted."""

# fp16 gradients below 6e-8 would vanish; the loss scaler's own factor comes later.
_FP16_SCALE = 8.0


def next_token_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the summed cross entropy in nats and the number of targets it sums over.

    Args:
        logits: `(B, T, V)`, of any floating type; the loss is computed in fp32, or in fp64 if they are fp64.
        targets: int64 `(B, T)`, the token that follows each position; `IGNORE_INDEX` where there is none to predict.

    Returns:
        The sum, a differentiable scalar, and the count, an int64 scalar.
    """
    if logits.dtype != torch.float64:
        logits = logits.float()
    loss_sum = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    return loss_sum, (targets != IGNORE_INDEX).sum()


def chunked_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    chunk: int,
    linear: Callable[[Tensor, Tensor], Tensor] = F.linear,
) -> Tensor:
    """Return the summed cross entropy in nats of `hidden @ weight.T`, `chunk` positions at a time.

    The gradient of a chunk's logits is known as soon as they are, so that it is computed and carried on at once: no
    chunk's logits outlive it, and none is computed twice.

    Args:
        hidden: `(B, T, C)`.
        weight: `(V, C)`.
        targets: int64 `(B, T)`, `IGNORE_INDEX` where there is none.
        chunk: positions whose logits, `(chunk, V)` in fp32, exist at a time.
        linear: computes `x @ weight.T`.
    """
    flat = hidden.flatten(0, 1)
    loss: Tensor = _ChunkedLoss.apply(flat, weight, targets.flatten(), chunk, linear)  # type: ignore[no-untyped-call]
    return loss


class _ChunkedLoss(torch.autograd.Function):
    """Sums the loss chunk by chunk, and the gradients with it where they will be asked for."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        chunk: int,
        linear: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        loss = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=loss.dtype) if needs_weight else None
        ctx.scale = 1.0
        for start in range(0, len(hidden), chunk):
            part, wanted = hidden[start : start + chunk], targets[start : start + chunk]
            logits = linear(part, weight)  # in the type of autocast, where there is one
            dtype = logits.dtype
            ctx.scale = _FP16_SCALE if dtype == torch.float16 else 1.0
            logits = logits.to(loss.dtype)
            is_target = wanted != IGNORE_INDEX
            rows, columns = torch.arange(len(wanted), device=wanted.device), wanted.where(is_target, 0)
            log_sums = logits.logsumexp(-1)
            loss += (log_sums - logits[rows, columns]).where(is_target, 0).sum()
            if grad_hidden is None and grad_weight is None:
                continue
            # d loss / d logits = softmax - one at the target, in place of the logits.
            gradient = logits.sub_(log_sums[:, None]).exp_()
            gradient[rows, columns] -= 1
            gradient = gradient.mul_(is_target[:, None] * ctx.scale).to(dtype)
            if grad_hidden is not None:
                grad_hidden[start : start + chunk] = linear(gradient, weight.to(dtype).T)
            if grad_weight is not None:
                grad_weight += linear(gradient.T, part.to(dtype).T)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        factor = gradients[0] / ctx.scale
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else (grad_hidden * factor).to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight * factor).to(ctx.weight_dtype),
            *[None] * 3,
        )
