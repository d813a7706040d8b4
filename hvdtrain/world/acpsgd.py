"""ACP-SGD (arXiv:2306.08881): PowerSGD's two factors in turn, one a step, so that each step has one round.

One factor of the last step is made orthonormal, and the gradient `M`, `(n, m)`, of a rank, what it remembers added, is
projected onto it:

    B = an orthonormal basis of Q           A = an orthonormal basis of P
    P = sum over the ranks of M B           Q = sum over the ranks of M^T A
    mean = P B^T, of this rank's own M      mean = A Q^T, of this rank's own M
    is kept M - (M B) B^T                   is kept M - A (M^T A)^T

in every other step the left, and the right in those between. What travels is half of PowerSGD's numbers, and nothing
waits for a first round: each bucket can leave as soon as backward has finished it. Q is kept transposed, `(r, m)`.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from hvdtrain.settings.compression import AUTO
from hvdtrain.world.error_feedback import MIN_SIZE, Parts, Piece, Round, flat
from hvdtrain.world.low_rank import LowRank, orthonormal, sides, split
from hvdtrain.world.memory import Memory

if TYPE_CHECKING:
    from hvdtrain.world.world import World

Side = Literal["left", "right"]


class AcpSGD(LowRank):
    """Low-rank gradients with error feedback, one factor a step.

    A tensor of two and more dimensions is a matrix of its first dimension by all others.

    Args:
        rank: of the products.
        min_size: tensors of fewer numbers are sent as they are.
        warmup_steps: in so many steps of a training everything is sent as it is.
        exact: parameters that are sent as they are, as `--comm.compression-exact` names them.
        min_saving: a matrix is sent as it is unless the larger factor has so many times fewer numbers.
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
        super().__init__(rank, min_size, warmup_steps, exact, min_saving=min_saving)
        self.name = f"acpsgd:{rank}"
        self._factors = {"left": Memory(), "right": Memory()}
        """P, and Q transposed, of the last steps that had them, by tensor; alike on all ranks."""
        self._fresh_factors: dict[str, Tensor] = {}
        self._turns: dict[str, int] = {}
        """How often each tensor was sent as a factor, in skipped steps, too; a GPU need not be asked which were."""

    def factor_size(self, shape: torch.Size) -> int:
        """Return the numbers of the larger factor."""
        return self.rank_of(shape) * max(sides(shape))

    def tensor_bytes(self, shape: torch.Size, dtype: torch.dtype) -> int:
        """Return the bytes of a step in the mean of two, or of the tensor as it is."""
        if not self.compresses(shape):
            return self.wire_bytes(shape.numel(), dtype)
        return self.wire_bytes(self.rank_of(shape) * sum(sides(shape)), dtype) // 2

    def begin(self, world: World, name: str, parts: Parts) -> Round:
        """Send this rank's part of one factor of each matrix."""
        factors = [self._factor(piece, self._side(piece)) for piece in parts.pieces]
        return _Projection(
            world, name, parts, factors, [self._side(piece) for piece in parts.pieces], self._fresh_factors
        )

    def _side(self, piece: Piece) -> Side:
        """Return which factor of the last step is gone on with: alike on all ranks."""
        return "left" if self._turns.get(piece.name, 0) % 2 else "right"

    def _factor(self, piece: Piece, side: Side) -> Tensor:
        """Return a factor of the last step, or random numbers that are alike on all ranks."""
        rows, columns = sides(piece.whole.shape)
        rank = self.rank_of(piece.whole.shape)
        like = piece.whole.new_empty((rows, rank) if side == "left" else (rank, columns))
        kept = self._factors[side].get(piece.name, like)
        if kept is not None:
            return kept
        generator = torch.Generator().manual_seed(zlib.crc32(piece.name.encode()))
        return like.copy_(torch.randn(like.shape, generator=generator, dtype=torch.float64, device="cpu"))

    def keep_more(self, piece: Piece, is_good: bool | Tensor) -> None:
        """Keep the other factor for the next step."""
        other: Side = "right" if self._side(piece) == "left" else "left"
        self._factors[other].put(piece.name, self._fresh_factors.pop(piece.name), is_good)
        self._turns[piece.name] = self._turns.get(piece.name, 0) + 1

    def settle(self, skipped: bool | Tensor) -> None:
        """End a step in which something was sent."""
        super().settle(skipped)
        for factors in self._factors.values():
            factors.settle(skipped)

    def state_dict(self) -> dict[str, Any]:
        """Return the factors too, and whose turn it is."""
        state = super().state_dict()
        factors = {side: kept.state_dict() for side, kept in self._factors.items()}
        return {**state, **factors, "turns": dict(self._turns)} if state else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from it."""
        super().load_state_dict(state)
        for side, kept in self._factors.items():
            kept.load_state_dict(state.get(side, {}))
        self._turns = dict(state.get("turns", {}))


class _Projection(Round):
    """The one round of a bucket; `turns` are where the bases, `(n, r)` or `(r, m)`, stand in the products."""

    def __init__(
        self,
        world: World,
        name: str,
        parts: Parts,
        factors: Sequence[Tensor],
        turns: Sequence[Side],
        kept_factors: dict[str, Tensor],
    ) -> None:
        self._parts, self._sides, self._kept_factors = parts, turns, kept_factors
        self._matrices = [piece.whole.view(sides(piece.whole.shape)) for piece in parts.pieces]
        tall = [factor if side == "left" else factor.t() for factor, side in zip(factors, turns, strict=True)]
        transposed = [basis.t().contiguous() for basis in orthonormal(tall)]
        self._bases = [basis.t() if side == "left" else basis for basis, side in zip(transposed, turns, strict=True)]
        self._own = [
            basis @ matrix if side == "left" else functional.linear(matrix, basis)
            for matrix, basis, side in zip(self._matrices, transposed, turns, strict=True)
        ]
        message = flat([*self._own, *parts.exact], parts.exact[-1])
        self._wait = world.start_all_reduce_(message, "sum", f"{name}.factors")

    def finish(self) -> tuple[list[Tensor], Tensor]:
        """Multiply the sum of the factors with the bases."""
        pairs = zip(self._parts.pieces, self._matrices, self._products(self._own), strict=True)
        errors = [torch.addmm(matrix, *pair, alpha=-1).view(piece.whole.shape) for piece, matrix, pair in pairs]
        message = self._wait()
        *factors, exact = split(message, [own.shape for own in self._own])
        self._parts.take_exact(exact)
        for matrix, pair in zip(self._matrices, self._products(factors), strict=True):
            torch.mm(*pair, out=matrix)
        for piece, factor in zip(self._parts.pieces, factors, strict=True):
            self._kept_factors[piece.name] = factor.clone()  # of its own: the message is all of them
        return errors, message.isfinite().all()

    def _products(self, factors: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Return each factor and its basis, in the order in which they are multiplied."""
        pairs = zip(factors, self._bases, self._sides, strict=True)
        return [(basis, factor) if side == "left" else (factor, basis) for factor, basis, side in pairs]
