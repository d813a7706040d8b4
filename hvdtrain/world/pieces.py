"""Which rank keeps the optimizer's state of which part of each parameter, and where that lies in a bucket."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hvdtrain.optim.divisible import Division
from hvdtrain.world.buckets import in_buckets
from hvdtrain.world.filling import flat, lies_densely, real

# A rank's part begins at a multiple of this many elements: kernels take whole vectors then.
_ALIGNMENT = 16


@dataclass(frozen=True)
class Part:
    """What one rank keeps of one parameter: numbers `start` to `end` of it, in the order in which they lie."""

    parameter: nn.Parameter
    start: int
    end: int
    is_whole: bool
    """The parameter as it is, in its own shape: its optimizer looks at it as a whole."""

    def view(self, tensor: Tensor) -> Tensor:
        """Return the part, `(end - start,)` or the whole, of a tensor that lies in memory as the parameter does."""
        return tensor if self.is_whole else flat(tensor)[self.start : self.end]


@dataclass(frozen=True)
class Cut:
    """Parameters that lie one after the other in a bucket, and where it is cut between the ranks."""

    parameters: tuple[nn.Parameter, ...]
    lengths: tuple[int, ...]
    """Elements of each rank, rank 0's first; the last may count some beyond the parameters."""
    is_whole: bool
    """The cuts lie between parameters."""

    def parts(self, rank: int) -> list[tuple[Part, int]]:
        """Return what a rank keeps, and where that begins in its part of the bucket, in the bucket's order."""
        begin = sum(self.lengths[:rank])
        end, offset, found = begin + self.lengths[rank], 0, []
        for parameter in self.parameters:
            first, last = max(begin, offset), min(end, offset + numbers_in(parameter))
            if first < last:
                part = Part(parameter, first - offset, last - offset, self.is_whole)
                found.append((part, first - begin))
            offset += numbers_in(parameter)
        return found


class Piece:
    """What this rank's optimizer moves: a part of a parameter, in the parameter's own memory.

    Args:
        part: which.
        offset: where its gradient begins in this rank's part of the bucket.
    """

    def __init__(self, part: Part, offset: int) -> None:
        self.part = part
        self.offset = offset
        own = part.parameter
        self.moved = nn.Parameter(part.view(own.detach()))
        """What stands in the optimizer's parameter groups; its `grad` is this part of the mean gradient."""
        self.is_used = False
        """A step has used its gradient, which ends with the next one: `model.zero_grad()` does not come by here."""
        grad_dtype = getattr(own, "grad_dtype", None)
        if grad_dtype not in (None, own.dtype):
            self.moved.grad_dtype = grad_dtype

    @property
    def fits(self) -> bool:
        """Return whether it still is the parameter's memory: `model.to(...)` gives it another."""
        return self.part.view(self.part.parameter.detach()).data_ptr() == self.moved.data_ptr()

    def drop_used(self) -> None:
        """Have no gradient that a step has used."""
        if self.is_used:
            self.moved.grad, self.is_used = None, False

    def add(self, numbers: Tensor, dtype: torch.dtype) -> None:
        """Add numbers to its gradient."""
        shape = real(self.moved.detach()).shape
        mean = numbers[self.offset : self.offset + shape.numel()].view(shape).to(dtype.to_real())
        mean = torch.view_as_complex(mean) if self.moved.is_complex() else mean
        self.moved.grad = mean if self.moved.grad is None else self.moved.grad + mean


def is_divisible(parameter: Tensor, division: Division) -> bool:
    """Return whether a parameter can be cut between two of its elements, if its optimizer lets it."""
    if division != "elements" or parameter.dim() == 0 or parameter.is_complex():
        return False
    return lies_densely(parameter)


def cut_for(
    ranks: int, parameters: Sequence[nn.Parameter], division: Mapping[nn.Parameter, Division], bucket_bytes: int
) -> list[Cut]:
    """Cut an optimizer's parameters between the ranks, alike on all of them.

    What can be divided is: each bucket gives every rank equally much. Other parameters go to one rank each, the largest
    first and always to the rank that has the least. Those that are frozen by now lie in buckets of their own.

    Args:
        ranks: number of them.
        parameters: in the model's order.
        division: how far each can be divided.
        bucket_bytes: of gradients in a bucket.
    """
    whole = [p for p in parameters if not is_divisible(p, division[p])]
    owner, load = {}, [0] * ranks
    for parameter in sorted(whole, key=lambda p: -p.nbytes):
        owner[parameter] = min(range(ranks), key=lambda rank: load[rank])
        load[owner[parameter]] += parameter.nbytes
    cuts = []
    for bucket in _groups(parameters, whole, bucket_bytes):
        if bucket[0] in owner:
            inside = sorted(bucket, key=lambda p: owner[p])
            lengths = [sum(numbers_in(p) for p in inside if owner[p] == rank) for rank in range(ranks)]
        else:
            inside = bucket
            share = -(-sum(p.numel() for p in inside) // ranks)
            lengths = [-(-share // _ALIGNMENT) * _ALIGNMENT] * ranks
        cuts.append(Cut(tuple(inside), tuple(lengths), bucket[0] in owner))
    return cuts


def _groups(
    parameters: Sequence[nn.Parameter], whole: Sequence[nn.Parameter], bucket_bytes: int
) -> list[list[nn.Parameter]]:
    """Return buckets of parameters that are cut alike, of one type, learning or frozen alike."""
    kinds: dict[tuple[bool, bool, torch.dtype], list[nn.Parameter]] = {}
    entire = set(whole)
    for parameter in parameters:
        kinds.setdefault((not parameter.requires_grad, parameter in entire, parameter.dtype), []).append(parameter)
    place = {parameter: i for i, parameter in enumerate(parameters)}
    buckets = [bucket for key in sorted(kinds, key=str) for bucket in in_buckets(kinds[key], bucket_bytes)]
    # In the order in which backward finishes them: each is ready when the first of its parameters in the model is.
    return sorted(buckets, key=lambda bucket: (not bucket[0].requires_grad, -min(place[p] for p in bucket)))


def numbers_in(parameter: Tensor) -> int:
    """Return how many real numbers a parameter has."""
    return parameter.numel() * (2 if parameter.is_complex() else 1)
