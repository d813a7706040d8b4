"""Cross entropy over a vocabulary, whole or in chunks that never hold all logits at once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hvdtrain.models.compilation import can_compile_for
from hvdtrain.models.linear import product_dtype
from hvdtrain.models.private_torch import constant_when_compiled, is_watched

_log = logging.getLogger(__name__)

IGNORE_INDEX = -100
"""A target that is not to be predicted: it adds nothing to the loss and is not counted."""

# Of logits in fp32 that exist at once. A GPU's products are faster the larger they are, and the sum over few chunks is
# cheaper: there, a share of its memory.
_BYTES = 2**28
_SHARE_OF_GPU = 1 / 32

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


@constant_when_compiled
def bytes_at_once(device: torch.device) -> int:
    """Return the bytes of logits in fp32 that may exist at a time: 256 MiB, of large GPUs a thirty-second part."""
    most = _BYTES
    if device.type == "cuda" and torch.cuda.is_available():
        share = int(torch.cuda.get_device_properties(device).total_memory * _SHARE_OF_GPU)
        most = max(most, 2 ** (share.bit_length() - 1))
    return most


def positions_at_once(num_logits: int, device: torch.device, num_bytes: int | None = None) -> int:
    """Return how many positions of so many logits each fit `num_bytes` in fp32; None: `bytes_at_once` of the device."""
    return max(1, (num_bytes or bytes_at_once(device)) // (4 * num_logits))


def is_by_chunks(num_targets: int, num_logits: int, device: torch.device, chunk: int) -> bool:
    """Return whether the loss of so many targets is to be computed by `chunked_loss`.

    It is where the logits would be more than may exist at once; and on GPUs where they are many, be it in a single
    chunk, since torch's own operators would go over them in fp32 five times instead of over what they are three times.
    """
    return num_targets > chunk or (4 * num_targets * num_logits > _BYTES and _is_fused(device))


@constant_when_compiled
def _is_fused(device: torch.device) -> bool:
    return can_compile_for(device)


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
        chunk: positions whose logits, `(chunk, V)` in fp32, exist at a time; at most, on GPUs.
        linear: computes `x @ weight.T`.
    """
    flat = hidden.flatten(0, 1)
    # Within `forward` nobody can tell: gradients are off there, and `needs_input_grad` goes by the tensors alone.
    needs_any = torch.is_grad_enabled()
    loss: Tensor = _ChunkedLoss.apply(flat, weight, targets.flatten(), chunk, linear, needs_any)  # type: ignore[no-untyped-call]
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
        needs_any: bool,
    ) -> Tensor:
        needs_hidden, needs_weight = (needs_any and needs for needs in ctx.needs_input_grad[:2])
        needs_any = needs_hidden or needs_weight
        weight_dtype, weight, inputs = weight.dtype, _as_multiplied(weight), _as_multiplied(hidden)
        loss = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight: Tensor | None = None
        if hidden.is_cuda and len(hidden):  # chunks alike, for which kernels are chosen and compiled once
            chunk = -(-len(hidden) // -(-len(hidden) // chunk))
        compute = _terms_for(hidden)
        ctx.scale = 1.0
        for start in range(0, len(hidden), chunk):
            part, wanted = inputs[start : start + chunk], targets[start : start + chunk]
            logits = linear(part, weight)  # in the type of autocast, where there is one
            dtype = logits.dtype
            ctx.scale = _FP16_SCALE if dtype == torch.float16 else 1.0
            summed, gradient = compute(logits, wanted, loss.dtype, ctx.scale if needs_any else None)
            del logits
            loss += summed
            if gradient is None:
                continue
            if grad_hidden is not None:
                grad_hidden[start : start + chunk] = linear(gradient, weight.to(dtype).T)
            if needs_weight:
                product = linear(gradient.T, part.to(dtype).T)
                # In the wider type; the first needs no zeros to be added to.
                grad_weight = product.to(loss.dtype) if grad_weight is None else grad_weight.add_(product)
        if needs_weight and grad_weight is None:
            grad_weight = torch.zeros_like(weight, dtype=loss.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight_dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        factor = gradients[0] / ctx.scale
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else (grad_hidden * factor).to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight * factor).to(ctx.weight_dtype),
            *[None] * 4,
        )


def _terms_for(hidden: Tensor) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """Return what computes a chunk's loss and gradient: on GPUs a compiled kernel, or what one at work fuses."""
    if torch.compiler.is_compiling():
        return fusable_terms if hidden.is_cuda else terms
    return fused_terms if can_compile_for(hidden.device) else terms


def _as_multiplied(tensor: Tensor) -> Tensor:
    """Return a tensor in the type that autocast would give it in each product anew."""
    return tensor.detach().to(product_dtype(tensor)) if tensor.dtype == torch.float32 else tensor


def terms(logits: Tensor, wanted: Tensor, dtype: torch.dtype, scale: float | None) -> tuple[Tensor, Tensor | None]:
    """Return the summed cross entropy and, times `scale`, its gradient by the logits; None for no scale.

    Args:
        logits: `(n, V)`; may be overwritten.
        wanted: int64 `(n,)`, `IGNORE_INDEX` where there is nothing to predict.
        dtype: of the computation and the sum; the gradient has that of the logits.
        scale: a factor of the gradient.
    """
    own, logits = logits.dtype, logits.to(dtype)
    is_target = wanted != IGNORE_INDEX
    rows, columns = torch.arange(len(wanted), device=wanted.device), wanted.where(is_target, 0)
    log_sums = logits.logsumexp(-1)
    loss = (log_sums - logits[rows, columns]).where(is_target, 0).sum()
    if scale is None:
        return loss, None
    # d loss / d logits = softmax - one at the target, in place of the logits.
    gradient = logits.sub_(log_sums[:, None]).exp_()
    gradient[rows, columns] -= 1
    return loss, gradient.mul_(is_target[:, None] * scale).to(own)


def fusable_terms(
    logits: Tensor, wanted: Tensor, dtype: torch.dtype, scale: float | None
) -> tuple[Tensor, Tensor | None]:
    """Do what `terms` does by operators on whole rows alone, none of which writes to a given place.

    A compiler makes one kernel of them, which goes over the logits twice: once for their sums, once for the gradient.
    By `logsumexp`, torch's would go over them three times: what that does about infinities hides the largest logit and
    the sum from it, which it finds together ("online softmax", arXiv:1805.02867) where they are written so.
    """
    own, values = logits.dtype, logits.to(dtype)
    is_target = wanted != IGNORE_INDEX
    columns = wanted.where(is_target, 0)[:, None]
    largest = values.amax(-1, keepdim=True)
    powers = (values - largest).exp()
    total = powers.sum(-1, keepdim=True)
    loss = (total.log() + largest - values.gather(-1, columns))[:, 0].where(is_target, 0).sum()
    if scale is None:
        return loss, None
    is_wanted = torch.arange(values.shape[-1], device=values.device) == columns
    gradient = (powers * total.reciprocal() - is_wanted.to(dtype)) * (is_target[:, None] * scale)
    return loss, gradient.to(own)


class _Fused:
    """`fusable_terms`, compiled when first used."""

    compiled: Callable[..., tuple[Tensor, Tensor | None]] | None = None
    has_failed = False


def fused_terms(
    logits: Tensor, wanted: Tensor, dtype: torch.dtype, scale: float | None
) -> tuple[Tensor, Tensor | None]:
    """Do what `terms` does by compiled kernels; where the compiler fails, by torch's own, and say so once."""
    if not _Fused.has_failed and not is_watched():
        _Fused.compiled = _Fused.compiled or torch.compile(fusable_terms, fullgraph=True)
        try:
            return _Fused.compiled(logits, wanted, dtype, scale)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever Triton, its C compiler and the driver have against each other
            _Fused.has_failed = True
            _log.warning("the loss is slower than it could be, since its kernels cannot be compiled: %s", error)
    return terms(logits, wanted, dtype, scale)
