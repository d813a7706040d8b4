"""Top-k: of each tensor the numbers of the largest size, with their places; the rest is remembered (arXiv:1809.07599).

Every rank is sent every rank's numbers and adds them in the order of the ranks, so that all have the same sum, bit by
bit.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hvdtrain.settings.compression import AUTO
from hvdtrain.world.error_feedback import MIN_SIZE, ErrorFeedback, Parts, Round, flat

if TYPE_CHECKING:
    from hvdtrain.world.world import World


_SAMPLE = 8192
"""Numbers of a long tensor that are looked at first."""


class TopK(ErrorFeedback):
    """The largest gradients with error feedback.

    Args:
        share: of the numbers of each tensor that is sent, above 0, at most 1; at least one of each tensor is.
        min_size: tensors of fewer numbers are sent as they are.
        warmup_steps: in so many steps of a training everything is sent as it is.
        exact: parameters that are sent as they are, as `--comm.compression-exact` names them.
    """

    def __init__(self, share: float, min_size: int = MIN_SIZE, warmup_steps: int = 0, exact: str = AUTO) -> None:
        super().__init__(min_size, warmup_steps, exact)
        self.name = f"topk:{share:g}"
        self._share = share

    def compresses(self, shape: torch.Size) -> bool:
        """Return whether it is large enough, and numbers and places take less than all of it."""
        return super().compresses(shape) and self.count(shape) * 2 < shape.numel()

    def count(self, shape: torch.Size) -> int:
        """Return how many numbers of a tensor are sent."""
        return math.ceil(self._share * shape.numel())

    def tensor_bytes(self, shape: torch.Size, dtype: torch.dtype) -> int:
        """Return the bytes of the numbers and of as many places, or of the tensor as it is."""
        return self.wire_bytes(2 * self.count(shape) if self.compresses(shape) else shape.numel(), dtype)

    def wire_bytes(self, count: int, dtype: torch.dtype) -> int:
        """Return the bytes of numbers that are sent as they are."""
        return count * self.buffer_type(dtype).itemsize

    def link_bytes(self, handed: int, size: int) -> int:
        """Return what a ring passes on: every rank's numbers go to all others."""
        return (size - 1) * handed

    def begin(self, world: World, name: str, parts: Parts) -> Round:
        """Send the largest numbers, their places, and what travels as it is."""
        return _Gathering(world, name, parts, [self.count(piece.whole.shape) for piece in parts.pieces])


class _Gathering(Round):
    """One all-gather: this rank's message is numbers, places and what travels as it is, all in the buffer's type."""

    def __init__(self, world: World, name: str, parts: Parts, counts: list[int]) -> None:
        self._size, self._parts = world.size, parts
        self._wholes = [piece.whole.view(-1) for piece in parts.pieces]
        like = parts.exact[-1]
        chosen = [largest(whole, count) for whole, count in zip(self._wholes, counts, strict=True)]
        self._chosen = chosen
        numbers = flat([whole[own] for whole, own in zip(self._wholes, chosen, strict=True)], like)
        starts = [0, *itertools.accumulate(len(whole) for whole in self._wholes)]
        # Places count through all pieces of the bucket. Their bits travel as numbers of the buffer's type.
        places = flat([own + start for own, start in zip(chosen, starts, strict=False)], like.long())
        self._places_type = torch.int32 if starts[-1] < 1 << 31 and like.itemsize == 4 else torch.int64
        self._total, self._count = starts[-1], len(numbers)
        bits = places.to(self._places_type).view(like.dtype)
        self._wait = world.start_all_gather(torch.cat([numbers, bits, *parts.exact]), f"{name}.largest")

    def finish(self) -> tuple[list[Tensor], Tensor]:
        """Add what all ranks have sent, in their order."""
        rows = self._wait().view(self._size, -1)
        width = self._count * self._places_type.itemsize // rows.element_size()
        widths = [self._count, width, rows.shape[1] - self._count - width]
        numbers, bits, exact = torch.split_with_sizes(rows, widths, 1)
        errors = [whole.clone().index_fill_(0, own, 0.0) for whole, own in zip(self._wholes, self._chosen, strict=True)]
        mean = rows.new_zeros(self._total)
        for own, places in zip(each_rank(numbers), each_rank(bits), strict=True):
            mean.index_add_(0, places.clone().view(self._places_type), own)
        for whole, part in zip(
            self._wholes, torch.split_with_sizes(mean, [len(whole) for whole in self._wholes]), strict=True
        ):
            whole.copy_(part)
        self._parts.take_exact(in_order(exact))
        shaped = [error.view(piece.whole.shape) for error, piece in zip(errors, self._parts.pieces, strict=True)]
        return shaped, numbers.isfinite().all()


def largest(numbers: Tensor, count: int) -> Tensor:
    """Return the places of the `count` numbers, of `(n,)`, that are furthest from 0.

    Of a long tensor in host memory, those above a bound are looked at alone, which a sample gives: the answer is the
    same, in a seventh of the time.
    """
    sizes = numbers.abs()
    step = len(numbers) // _SAMPLE
    if step > 1 and numbers.device.type == "cpu":
        sample = sizes[::step]
        wanted = min(len(sample), int(1.5 * count / step) + 16)
        bound = sample.topk(wanted).values[-1]
        candidates = (~(sizes < bound)).nonzero().view(-1)  # what is not a number counts as the largest
        if count <= len(candidates) < len(numbers) // 2:
            return candidates[sizes[candidates].topk(count, sorted=False).indices]
    return sizes.topk(count, sorted=False).indices


def each_rank(rows: Tensor) -> Tensor:
    """Return the ranks' rows, `(ranks, n)`, that are to be gone through one after the other.

    On the device `meta`, where there are no numbers to add, that is the first: a million would take minutes.
    """
    return rows[:1] if rows.is_meta else rows


def in_order(rows: Tensor) -> Tensor:
    """Return the sum of the ranks' rows, `(ranks, n)`, added in their order."""
    total = rows[0].clone()
    for row in each_rank(rows)[1:]:
        total += row
    return total
