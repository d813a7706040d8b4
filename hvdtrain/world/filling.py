"""Gradients into the flat buffer that is sent: each divided by the number of ranks, and who has none marked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hvdtrain.models.private_torch import copy_all_, divided_all, zero_all_

# What a core keeps at hand: a second pass over it costs less than a call for each tensor.
_FITS_A_CORE = 1 << 20


def fill(
    numbers: Tensor, views: Sequence[Tensor], users: Tensor, gradients: Sequence[Tensor | None], size: int
) -> None:
    """Put each gradient, divided by the number of ranks, into its part of the buffer; zeros where there is none.

    Args:
        numbers: the buffer, `(n,)`.
        views: its parts, of one type; a gradient may be its part already.
        users: `(len(views),)`, becomes 1 / size for each gradient that there is, else 0.
        gradients: as many, dense or sparse.
        size: number of ranks; 1 where the sum is divided afterwards.
    """
    users.fill_(1 / size)
    for i, gradient in enumerate(gradients):
        if gradient is None:
            users[i] = 0
    is_dense = not any(gradient is not None and gradient.is_sparse for gradient in gradients)
    if is_dense and (users.is_cuda or numbers.nbytes <= _FITS_A_CORE):
        fill_at_once(numbers, views, gradients, size)
    else:
        fill_one_by_one(views, gradients, size)


def fill_one_by_one(views: Sequence[Tensor], gradients: Sequence[Tensor | None], size: int) -> None:
    """Take one pass over each gradient, which is the least on CPUs."""
    for view, whole in zip(views, gradients, strict=True):
        if whole is None:
            view.zero_()
            continue
        gradient = real(whole.detach().to_dense())
        if size == 1:
            view.copy_(gradient)
        else:
            torch.div(gradient.to(_divided_as(gradient.dtype, view.dtype)), size, out=view)


def fill_at_once(numbers: Tensor, views: Sequence[Tensor], gradients: Sequence[Tensor | None], size: int) -> None:
    """Take a few calls for all of them: on GPUs, and for little, each has its price. The same numbers."""
    empty = [view for view, gradient in zip(views, gradients, strict=True) if gradient is None]
    pairs = [(view, real(own.detach())) for view, own in zip(views, gradients, strict=True) if own is not None]
    if empty:
        zero_all_(empty)
    if pairs and (wide := _divided_as(pairs[0][1].dtype, views[0].dtype)) != views[0].dtype:
        # Divided before it is rounded: fp16 may be too narrow for it, and would round it twice.
        copy_all_([view for view, _ in pairs], divided_all([gradient.to(wide) for _, gradient in pairs], size))
        return
    moved = [(view, gradient) for view, gradient in pairs if view.data_ptr() != gradient.data_ptr()]
    if moved:
        copy_all_([view for view, _ in moved], [gradient for _, gradient in moved])
    if size & (size - 1):
        numbers.div_(size)
    elif size > 1:  # the same bits, in half the time
        numbers.mul_(1 / size)


def _divided_as(gradient: torch.dtype, view: torch.dtype) -> torch.dtype:
    """Return the type in which a gradient is divided: that of the two which holds both, such as fp32 for bfloat16."""
    return gradient if gradient == view else torch.promote_types(gradient, view)


def real(tensor: Tensor) -> Tensor:
    """Return the tensor, a complex one as pairs of real numbers, `(..., 2)`."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def flat(tensor: Tensor) -> Tensor:
    """Return the elements, `(n,)`, of a tensor without gaps, in the order in which they lie in memory."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def like(numbers: Tensor, parameter: Tensor) -> Tensor:
    """Return `(n,)` numbers in a parameter's shape and order: the other way round as `flat`."""
    return numbers.as_strided(parameter.shape, parameter.stride(), numbers.storage_offset())


def lies_densely(tensor: Tensor) -> bool:
    """Return whether a tensor has no gaps and overlaps: in some order of its dimensions it is contiguous."""
    expected = 1
    for stride, length in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if length > 1 and stride != expected:
            return False
        expected *= length
    return tensor.numel() > 0


def repeats(tensor: Tensor) -> bool:
    """Return whether a place in memory is several elements, as after `expand`: nothing can be written into it."""
    return any(stride == 0 and length > 1 for stride, length in zip(tensor.stride(), tensor.shape, strict=True))
