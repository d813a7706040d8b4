"""PowerSGD (arXiv:1905.13727, algorithms 1 and 2): the gradient of a matrix as the product of two thin ones.

One power iteration a step, which begins with the factor Q of the step before. For a gradient `M`, `(n, m)`, of a rank,
what it remembers added:

    P = sum over the ranks of M Q          all-reduce of n x r numbers
    P = an orthonormal basis of P
    Q = sum over the ranks of M^T P        all-reduce of m x r numbers
    mean = P Q^T                           what is kept: M - P (M^T P)^T, of this rank's own M

All P of a bucket, and what is sent as it is, travel in one all-reduce as soon as backward has finished the bucket; the
Q of all buckets in another one, when backward is over. Q is kept transposed, `(r, m)`: so both products go through M by
its rows, in a fraction of the time.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from hvdtrain.settings.compression import AUTO
from hvdtrain.world.error_feedback import MIN_SIZE, ErrorFeedback, Parts, Piece, Round, flat
from hvdtrain.world.memory import Memory

if TYPE_CHECKING:
    from hvdtrain.world.world import World


class PowerSGD(ErrorFeedback):
    """Low-rank gradients with error feedback.

    A tensor of two and more dimensions is a matrix of its first dimension by all others.

    Args:
        rank: of the products.
        min_size: tensors of fewer numbers are sent as they are.
        warmup_steps: in so many steps of a training everything is sent as it is.
        exact: parameters that are sent as they are, as `--comm.compression-exact` names them.
        min_saving: a matrix is sent as it is unless its factors have so many times fewer numbers.
    """

    def __init__(
        self,
        rank: int,
        min_size: int = MIN_SIZE,
        warmup_steps: int = 0,
        exact: str = AUTO,
        *,
        min_saving: float = 1.0,
    ) -> None:
        super().__init__(min_size, warmup_steps, exact)
        self.name = f"powersgd:{rank}"
        self._rank = rank
        self._min_saving = min_saving
        self._factors = Memory()
        """Q of the last step, transposed, by tensor; alike on all ranks."""
        self._fresh_factors: dict[str, Tensor] = {}

    def compresses(self, shape: torch.Size) -> bool:
        """Return whether it is a matrix that is large enough, and whose factors are smaller."""
        if len(shape) < 2 or not super().compresses(shape):
            return False
        return self._factor_size(shape) * self._min_saving < shape.numel()

    def _factor_size(self, shape: torch.Size) -> int:
        rows, columns = _sides(shape)
        return min(self._rank, rows, columns) * (rows + columns)

    def tensor_bytes(self, shape: torch.Size, dtype: torch.dtype) -> int:
        """Return the bytes of both factors, or of the tensor as it is."""
        return self.wire_bytes(self._factor_size(shape) if self.compresses(shape) else shape.numel(), dtype)

    def wire_bytes(self, count: int, dtype: torch.dtype) -> int:
        """Return the bytes of numbers that are sent as they are."""
        return count * self.buffer_type(dtype).itemsize

    def begin(self, world: World, name: str, parts: Parts) -> Round:
        """Send this rank's part of all P."""
        return _PowerIteration(world, name, parts, [self._factor(piece) for piece in parts.pieces], self._fresh_factors)

    def advance(self, world: World, rounds: Mapping[str, Round]) -> None:
        """Send this rank's part of all Q, of all buckets of a type in one message."""
        # Those sent first have arrived: they are multiplied while the rest travels.
        known = {name: own for name, own in rounds.items() if isinstance(own, _PowerIteration)}
        found = {name: (own, own.factors()) for name, own in known.items() if own.wait_second is None}
        groups: dict[tuple[torch.dtype, torch.device], list[tuple[_PowerIteration, Tensor]]] = {}
        for name in sorted(found):
            own, factors = found[name]
            groups.setdefault((factors.dtype, factors.device), []).append((own, factors))
        for group in groups.values():
            joined = _Joined(world, f"{group[0][0].name}.q", [factors for _, factors in group])
            for number, (own, _) in enumerate(group):
                own.wait_second = partial(joined.part, number)

    def _factor(self, piece: Piece) -> Tensor:
        """Return Q of the last step, or random numbers that are alike on all ranks."""
        rows, columns = _sides(piece.whole.shape)
        like = piece.whole.new_empty(min(self._rank, rows, columns), columns)
        kept = self._factors.get(piece.name, like)
        if kept is not None:
            return kept
        generator = torch.Generator().manual_seed(zlib.crc32(piece.name.encode()))
        return like.copy_(torch.randn(like.shape, generator=generator, dtype=torch.float64, device="cpu"))

    def keep_more(self, piece: Piece, is_good: bool | Tensor) -> None:
        """Keep Q for the next step."""
        self._factors.put(piece.name, self._fresh_factors.pop(piece.name), is_good)

    def settle(self, skipped: bool | Tensor) -> None:
        """End a step in which something was sent."""
        super().settle(skipped)
        self._factors.settle(skipped)

    def state_dict(self) -> dict[str, Any]:
        """Return the factors Q too."""
        state = super().state_dict()
        return {**state, "factors": self._factors.state_dict()} if state else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from it."""
        super().load_state_dict(state)
        self._factors.load_state_dict(state.get("factors", {}))


class _PowerIteration(Round):
    """A bucket on its way: all P by themselves, all Q with those of other buckets."""

    def __init__(
        self, world: World, name: str, parts: Parts, factors: Sequence[Tensor], kept_factors: dict[str, Tensor]
    ) -> None:
        self.name, self._parts = name, parts
        self._matrices = [piece.whole.view(_sides(piece.whole.shape)) for piece in parts.pieces]
        self._kept_factors = kept_factors
        with _in_own_type(parts.exact[-1]):
            products = [functional.linear(*pair) for pair in zip(self._matrices, factors, strict=True)]
        self._shapes = [product.shape for product in products]
        message = flat([*products, *parts.exact], parts.exact[-1])
        self._wait_first = world.start_all_reduce_(message, "sum", f"{name}.p")
        self._bases: list[Tensor] = []
        self._own: list[Tensor] = []
        self.wait_second: Callable[[], Tensor] | None = None
        """Waits for this bucket's Q, flat, once they are on their way."""

    def factors(self) -> Tensor:
        """Make the sum of all P orthonormal; returns this rank's part of all Q, `(n,)`."""
        *products, exact = _split(self._wait_first(), self._shapes)
        self._parts.take_exact(exact)
        # Where P is not finite, the basis is not either, and no rank keeps anything of the step.
        with _in_own_type(exact):
            self._bases = _orthonormal(products)
            pairs = zip(self._matrices, self._bases, strict=True)
            self._own = [basis.t().contiguous() @ matrix for matrix, basis in pairs]
        return flat(self._own, exact)

    def finish(self) -> tuple[list[Tensor], Tensor]:
        """Multiply the factors."""
        assert self.wait_second is not None
        with _in_own_type(self._parts.exact[-1]):
            errors = [  # while Q travels
                torch.addmm(matrix, basis, factor, alpha=-1)
                for matrix, basis, factor in zip(self._matrices, self._bases, self._own, strict=True)
            ]
        message = self.wait_second()
        factors = _split(message, [own.shape for own in self._own])[:-1]
        for piece, matrix, basis, factor in zip(self._parts.pieces, self._matrices, self._bases, factors, strict=True):
            torch.mm(basis, factor, out=matrix)
            self._kept_factors[piece.name] = factor.clone()  # of its own: the message is all of them
        kept = [error.view(piece.whole.shape) for error, piece in zip(errors, self._parts.pieces, strict=True)]
        return kept, message.isfinite().all()


class _Joined:
    """A message of several buckets' parts, all of one type and device, that are added over the ranks."""

    def __init__(self, world: World, name: str, parts: Sequence[Tensor]) -> None:
        self._lengths = [len(part) for part in parts]
        total = torch.cat(list(parts))
        self._wait = world.start_all_reduce_(total, "sum", name) if len(total) else lambda: total
        self._sums: Sequence[Tensor] | None = None

    def part(self, number: int) -> Tensor:
        """Wait, and return the sum of one of the parts."""
        if self._sums is None:
            self._sums = torch.split_with_sizes(self._wait(), self._lengths)
        return self._sums[number]


def _in_own_type(like: Tensor) -> contextlib.AbstractContextManager[object]:
    """Return a context in which products have the type of their matrices, be it within autocast."""
    kind = like.device.type
    is_cast = not like.is_meta and torch.is_autocast_enabled(kind)  # torch's "meta" has none
    return torch.autocast(kind, enabled=False) if is_cast else contextlib.nullcontext()


def _sides(shape: torch.Size) -> tuple[int, int]:
    """Return the rows and columns of the matrix that a tensor is taken for."""
    return shape[0], shape[1:].numel()


def _split(message: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Return the matrices at the beginning of a message, and the rest of it."""
    sizes = [shape.numel() for shape in shapes]
    *parts, rest = torch.split_with_sizes(message, [*sizes, len(message) - sum(sizes)])
    return [*(part.view(shape) for part, shape in zip(parts, shapes, strict=True)), rest]


def _orthonormal(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Return for each matrix `(n, r)` a basis `(n, r)` of its columns: QR by Householder's reflections.

    That has no zero to divide by where a matrix is of lower rank. Those of one shape are given to it together.
    """
    bases: list[Tensor] = [*matrices]
    places: dict[torch.Size, list[int]] = {}
    for place, matrix in enumerate(matrices):
        places.setdefault(matrix.shape, []).append(place)
    for own in places.values():
        found = torch.linalg.qr(torch.stack([matrices[place] for place in own]))[0]
        for place, basis in zip(own, found, strict=True):
            bases[place] = basis
    return bases
