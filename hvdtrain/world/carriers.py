"""Types of numbers that no back end carries: they travel as others, bit for bit, or are refused by name."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from hvdtrain.errors import UsageError

_log = logging.getLogger("hvdtrain")
_said: set[str] = set()
"""Kinds of collectives of which it was said that gradients end there."""

ReduceOp = Literal["sum", "mean", "min", "max"]
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_REDUCED = (torch.float16, torch.float32, torch.float64, torch.int32, torch.int64)
"""Types that every back end reduces."""
_WIDER = {
    torch.bool: torch.int32,
    torch.int8: torch.int32,
    torch.uint8: torch.int32,
    torch.int16: torch.int32,
    torch.uint16: torch.int32,
    torch.uint32: torch.int64,
}
_WIDER_SUMS = {**_WIDER, torch.int32: torch.int64}
"""The same where they are added: what is more than the tensor's own type holds is seen."""


def for_reduction(
    tensor: Tensor, op: ReduceOp, name: str, adds_bfloat16: bool = False
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return a contiguous copy that every back end can reduce, and what turns the result back into the tensor's type.

    bfloat16 and 8-bit floats are added as fp32 and rounded once; small integers as larger ones. Where the back end adds
    bfloat16 in just that way itself, `adds_bfloat16`, it travels as it is. Minima and maxima are those of torch: where
    any rank has nan, it is nan. By MPI's own it depends on which rank has it.

    Raises:
        UsageError: the tensor has no such reduction; names it and says what to do. What turns the result back raises it
            where the sum is more than the type holds.
    """
    check_op(op)
    check_tensor(tensor, name)
    dtype = tensor.dtype
    tensor = tensor.detach()
    if not (dtype.is_floating_point or dtype.is_complex) and op == "mean":
        raise UsageError(f"'{name}' is {dtype}, which has no mean: give .float(), or ask for the sum")
    if dtype == torch.bool and op == "sum":
        raise UsageError(f"'{name}' is torch.bool, which has no sum: ask for max (any) or min (all), or give .int()")
    if dtype.is_complex:
        if op in ("min", "max"):
            raise UsageError(f"'{name}' is {dtype}, which has no {op}: give its .abs(), or torch.view_as_real of it")
        real = torch.view_as_real(tensor.resolve_conj()).clone(memory_format=torch.contiguous_format)
        return real, torch.view_as_complex
    if dtype.is_floating_point and op in ("min", "max"):
        return _in_order(tensor, op), lambda result: _out_of_order(result).to(dtype)
    if dtype in _WIDER_SUMS and op == "sum":
        return tensor.to(_WIDER_SUMS[dtype]).contiguous(), lambda result: _narrowed(result, dtype, name)
    if dtype in _REDUCED or (dtype == torch.bfloat16 and adds_bfloat16):
        return tensor.clone(memory_format=torch.contiguous_format), lambda result: result
    carrier = torch.float32 if dtype.is_floating_point else _WIDER.get(dtype)
    if carrier is None:
        raise UsageError(f"'{name}' is {dtype}, which cannot be reduced over ranks: give .long() or .double()")
    return tensor.to(carrier).contiguous(), lambda result: result.to(dtype)


def _in_order(tensor: Tensor, op: ReduceOp) -> Tensor:
    """Return integers that are ordered as floats are, nan behind all others where the largest is asked for, or ahead.

    The bits of a float are in its order where it is positive, and in the reverse where it is not.
    """
    numbers = tensor if tensor.dtype == torch.float64 else tensor.float()
    ordered = _flipped(numbers.contiguous().view(_BITS[numbers.element_size()]))
    limits = torch.iinfo(ordered.dtype)
    return ordered.masked_fill_(numbers.isnan(), limits.max if op == "max" else limits.min)


def _out_of_order(ordered: Tensor) -> Tensor:
    return _flipped(ordered).view(torch.float64 if ordered.dtype == torch.int64 else torch.float32)


def _flipped(bits: Tensor) -> Tensor:
    """Return the bits with all but the sign inverted where that is set; twice, they are what they were."""
    return bits ^ ((bits >> (8 * bits.element_size() - 1)) & torch.iinfo(bits.dtype).max)


def _narrowed(total: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    result = total.to(dtype)
    if not torch.equal(result.to(total.dtype), total):
        raise UsageError(f"the sum of '{name}' over the ranks is more than {dtype} holds: give .long()")
    return result


def bits_of(tensor: Tensor, name: str) -> tuple[Tensor, Callable[[], None]]:
    """Return the tensor's bits as integers or floats that every back end copies, and what writes them back.

    They have the tensor's shape, by which the back end sees that ranks have the same: a complex one's ends with 2, and
    a single number's is `(1,)`. They share its memory where it is contiguous; else, call the second after a change.

    Raises:
        UsageError: the tensor has no bits that can be written, one by one; names it.
    """
    check_tensor(tensor, name)
    target = distinct(tensor.detach(), name)
    plain = target.resolve_conj().resolve_neg().contiguous()
    plain = plain if plain.dim() else plain.view(1)
    if plain.dtype.is_complex:
        plain = torch.view_as_real(plain)
    bits = plain if plain.dtype in _REDUCED else plain.view(_BITS[plain.element_size()])

    def write_back() -> None:
        if bits.data_ptr() != target.data_ptr() or target.is_conj() or target.is_neg():
            real = bits.view(target.dtype.to_real() if target.is_complex() else target.dtype)
            values = torch.view_as_complex(real.view(*target.shape, 2)) if target.is_complex() else real
            target.copy_(values.view(target.shape))

    return bits, write_back


def with_bits(tensor: Tensor, name: str, exchange: Callable[[Tensor], Tensor]) -> Tensor:
    """Exchange rows of a tensor of any type as the bits of one that every back end carries."""
    rows = tensor.detach().resolve_conj().resolve_neg().contiguous()
    received = exchange(bits_of(rows, name)[0])
    flat = received.reshape(-1)
    if tensor.is_complex():
        flat = torch.view_as_complex(flat.view(-1, 2))
    return flat.view(tensor.dtype).view(-1, *tensor.shape[1:]) if flat.numel() else rows.new_zeros(0, *rows.shape[1:])


def check_op(op: Any) -> None:
    """Raise UsageError where there is no such reduction."""
    if op not in get_args(ReduceOp):
        raise UsageError(f"there is no reduction {op!r}: give sum, mean, min or max")


def check_tensor(value: Any, name: str) -> None:
    """Raise UsageError where a value is no tensor, or one of a kind that does not travel."""
    if not isinstance(value, Tensor):
        raise UsageError(
            f"'{name}' is no tensor but of type {type(value).__name__}: give torch.as_tensor of it; what else pickles"
            " goes by broadcast_object and all_gather_object"
        )
    if value.layout != torch.strided or value.is_quantized or value.is_nested:
        what = "quantized" if value.is_quantized else "nested" if value.is_nested else str(value.layout)
        raise UsageError(f"'{name}' is a {what} tensor, which cannot travel between ranks: keep it dense, .to_dense()")
    if value.is_meta:
        raise UsageError(f"'{name}' is on torch's device meta, and has no numbers: move it, as by .to_empty()")


def say_where_gradients_end(tensor: Tensor, kind: str, rank: int) -> None:
    """Warn once, on rank 0, of a tensor through which the user's loss is to be differentiated: it ends here.

    A single number is left alone: it is a loss to be shown. So are weights themselves.
    """
    if rank or kind in _said or tensor.grad_fn is None or not torch.is_grad_enabled() or tensor.numel() <= 1:
        return
    _said.add(kind)
    _log.warning(
        "no gradient flows through World.%s(): what it returns is a constant for the loss. Give .detach() if that is"
        " meant; all_reduce(..., differentiable=True) and all_gather(..., differentiable=True) let gradients through",
        kind,
    )


def check_rank(root: Any, size: int) -> None:
    """Raise UsageError where there is no such rank."""
    try:
        is_there = 0 <= operator.index(root) < size
    except TypeError:
        is_there = False
    if not is_there:
        raise UsageError(f"there is no rank {root!r}: ranks are 0 to {size - 1}")


def number_of(value: Any, op: ReduceOp, name: str, size: int = 1) -> Tensor:
    """Return a plain number, of numpy too, as 64 bits in host memory; whole ones as int64 but for their mean.

    Raises:
        UsageError: it is none, or too large, be it for a sum over `size` ranks.
    """
    check_op(op)
    plain = value.item() if isinstance(value, np.generic) else value
    if not isinstance(plain, int | float | complex):
        check_tensor(value, name)
    dtype = torch.complex128 if isinstance(plain, complex) else torch.float64
    if isinstance(plain, int) and op != "mean":
        dtype = torch.int64
        if op == "sum" and abs(plain) > torch.iinfo(dtype).max // size:
            raise UsageError(f"'{name}' may be a number of more than 64 bits over {size} ranks: give float() of it")
    try:
        return torch.tensor(plain, dtype=dtype, device="cpu")
    except (OverflowError, RuntimeError, ValueError) as error:
        raise UsageError(f"'{name}' is a number of more than 64 bits: give float() of it") from error


def distinct(tensor: Tensor, name: str) -> Tensor:
    """Return the part of a tensor in which each number lies in memory of its own: `expand` repeats one."""
    repeated = [size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    tensor = tensor[tuple(slice(0, 1) if is_repeated else slice(None) for is_repeated in repeated)]
    sizes = sorted(
        ((stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1), reverse=False
    )
    reach = 1
    for stride, size in sizes:
        if stride < reach:
            raise UsageError(f"'{name}' overlaps itself in memory, and cannot be made equal on all ranks: .clone() it")
        reach = stride * size
    return tensor
