"""8 bits a number: blocks of numbers with a scale each; what rounding leaves is remembered.

On two ranks each sends the other its numbers (all-gather). On more, each is sent its share of the blocks by all others
(all-to-all), adds them, rounds the sums to 8 bits in turn and sends these to all (all-gather): per rank (n - 1) bytes a
number for the first way, 2 (n - 1) / n for the second, which are equal on two ranks, where the first rounds once only.
What the second rounding leaves is remembered by the rank that has rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hvdtrain.world.error_feedback import ErrorFeedback, Parts, Round, flat
from hvdtrain.world.topk import each_rank, in_order

if TYPE_CHECKING:
    from hvdtrain.world.world import World

BLOCK = 256
"""Numbers that share a scale."""
_LARGEST = 127


class Int8(ErrorFeedback):
    """Gradients of 8 bits with error feedback.

    Args:
        min_size: tensors of fewer numbers are sent as they are.
        warmup_steps: in so many steps of a training everything is sent as it is.
        exact: parameters that are sent as they are, as `--comm.compression-exact` names them.
    """

    name = "int8"

    def tensor_bytes(self, shape: torch.Size, dtype: torch.dtype) -> int:
        """Return the bytes of whole blocks and their scales, or of the tensor as it is."""
        if not self.compresses(shape):
            return self.wire_bytes(shape.numel(), dtype)
        return -(-shape.numel() // BLOCK) * (BLOCK + self.buffer_type(dtype).itemsize)

    def wire_bytes(self, count: int, dtype: torch.dtype) -> int:
        """Return the bytes of numbers that are sent as they are."""
        return count * self.buffer_type(dtype).itemsize

    def begin(self, world: World, name: str, parts: Parts) -> Round:
        """Send what was rounded, and what travels as it is."""
        if world.size <= 2:
            return _Gathering(world, name, parts)
        return _Scattering(world, name, parts)


class _Blocks:
    """The pieces of a bucket as rows of a matrix, each padded with zeros to whole rows."""

    def __init__(self, parts: Parts) -> None:
        self._pieces = parts.pieces
        self._counts = [-(-piece.whole.numel() // BLOCK) for piece in parts.pieces]
        self.whole = parts.exact[-1].new_zeros(sum(self._counts), BLOCK)
        for piece, own in zip(self._pieces, self.of_pieces(self.whole), strict=True):
            own.copy_(piece.whole.view(-1))

    def of_pieces(self, rows: Tensor) -> list[Tensor]:
        """Return each piece's numbers, `(n,)`, as a view of the rows."""
        parts = torch.split_with_sizes(rows, self._counts)
        return [part.view(-1)[: piece.whole.numel()] for part, piece in zip(parts, self._pieces, strict=True)]

    def write(self, mean: Tensor, errors: Tensor) -> list[Tensor]:
        """Put the mean into the pieces; return what is kept of each, in tensors of their own."""
        for piece, own in zip(self._pieces, self.of_pieces(mean), strict=True):
            piece.whole.copy_(own.view(piece.whole.shape))
        kept = zip(self.of_pieces(errors), self._pieces, strict=True)
        return [own.clone().view(piece.whole.shape) for own, piece in kept]


class _Gathering(Round):
    """All ranks' numbers to all: a message is what travels as it is, scales, and numbers, as bytes."""

    def __init__(self, world: World, name: str, parts: Parts) -> None:
        self._size, self._parts, self._blocks = world.size, parts, _Blocks(parts)
        self._scales, self._codes = rounded(self._blocks.whole)
        self._exact = flat(parts.exact, parts.exact[-1])
        message = torch.cat([_bytes(self._exact), _bytes(self._scales), _bytes(self._codes)])
        self._wait = world.start_all_gather(message, f"{name}.numbers")

    def finish(self) -> tuple[list[Tensor], Tensor]:
        """Add what all ranks have sent, in their order."""
        rows = self._wait().view(self._size, -1)
        lengths = [self._exact.nbytes, self._scales.nbytes, self._codes.nbytes]
        exact, scales, codes = torch.split_with_sizes(rows, lengths, 1)
        self._parts.take_exact(in_order(_numbers(exact, self._exact)))
        all_scales = _numbers(scales, self._scales)
        mean = torch.zeros_like(self._blocks.whole)
        for own, part in zip(each_rank(all_scales), each_rank(codes), strict=True):
            mean += read(own, part.contiguous().view(torch.int8).view(mean.shape))
        errors = self._blocks.whole - read(self._scales, self._codes)
        return self._blocks.write(mean, errors), all_scales.isfinite().all()


class _Scattering(Round):
    """A share of the blocks to each rank, and their sums to all."""

    def __init__(self, world: World, name: str, parts: Parts) -> None:
        self._world, self._name, self._parts, self._blocks = world, name, parts, _Blocks(parts)
        scales, codes = rounded(self._blocks.whole)
        self._errors = self._blocks.whole - read(scales, codes)
        self._share = -(-len(codes) // world.size)
        missing = self._share * world.size - len(codes)
        scales = torch.cat([scales, scales.new_zeros(missing)]).view(world.size, self._share)
        codes = torch.cat([codes, codes.new_zeros(missing, BLOCK)]).view(world.size, self._share * BLOCK)
        exact = flat(parts.exact, parts.exact[-1]).repeat(world.size, 1)  # everybody adds that
        self._like = scales
        self._widths = [row.shape[1] * row.element_size() for row in (exact, scales, codes)]
        message = torch.cat([_rows(exact), _rows(scales), _rows(codes)], 1)
        self._wait_first = world.start_all_to_all(message.view(-1), f"{name}.parts")
        self._wait_second: Callable[[], Tensor] | None = None

    def advance(self) -> None:
        """Add this rank's share, round the sums and send them."""
        if self._wait_second is not None:
            return
        rows = self._wait_first().view(self._world.size, -1)
        exact, scales, codes = torch.split_with_sizes(rows, self._widths, 1)
        self._parts.take_exact(in_order(_numbers(exact, self._like)))
        total = self._like.new_zeros(self._share, BLOCK)
        for own, part in zip(each_rank(_numbers(scales, self._like)), each_rank(codes), strict=True):
            total += read(own, part.contiguous().view(torch.int8).view(total.shape))
        own_scales, own_codes = rounded(total)
        left = total - read(own_scales, own_codes)
        first = self._world.rank * self._share
        mine = self._errors[first : first + self._share]
        mine += left[: len(mine)]
        message = torch.cat([_bytes(own_scales), _bytes(own_codes)])
        self._wait_second = self._world.start_all_gather(message, f"{self._name}.means")

    def finish(self) -> tuple[list[Tensor], Tensor]:
        """Read the sums."""
        self.advance()
        assert self._wait_second is not None
        rows = self._wait_second().view(self._world.size, -1)
        width = self._share * self._like.element_size()
        scales = _numbers(rows[:, :width], self._like).reshape(-1)
        codes = rows[:, width:].contiguous().view(torch.int8).view(-1, BLOCK)
        mean = read(scales, codes)[: len(self._blocks.whole)]
        return self._blocks.write(mean, self._errors), scales.isfinite().all()


def rounded(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return a scale for each row, `(n,)`, and the numbers, `(n, BLOCK)`, in it as int8.

    A scale is not finite where a number of its row is not; the numbers then mean nothing.
    """
    scales = rows.abs().amax(1) / _LARGEST if len(rows) else rows.new_zeros(0)
    # Numbers so small that their scale has lost its last bits are rounded to 0.
    divisors = torch.where(scales < torch.finfo(rows.dtype).tiny, 1.0, scales)
    return scales, (rows / divisors[:, None]).round_().to(torch.int8)


def read(scales: Tensor, codes: Tensor) -> Tensor:
    """Return the numbers of rows, `(n, BLOCK)`, as of the scales' type."""
    return codes.to(scales.dtype).mul_(scales[:, None])


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _rows(tensor: Tensor) -> Tensor:
    """Return the bytes of each row."""
    return tensor.contiguous().view(torch.uint8)


def _numbers(rows: Tensor, like: Tensor) -> Tensor:
    """Return rows of bytes as numbers of the type of `like`."""
    return rows.reshape(-1).clone().view(like.dtype).view(len(rows), rows.shape[1] // like.itemsize)
