"""What formats share that send a matrix as the product of two thin ones: PowerSGD and ACP-SGD."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hvdtrain.settings.compression import AUTO
from hvdtrain.world.error_feedback import MIN_SIZE, ErrorFeedback


class LowRank(ErrorFeedback):
    """Matrices of low rank with error feedback.

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
        self.rank = rank
        self._min_saving = min_saving

    def compresses(self, shape: torch.Size) -> bool:
        """Return whether it is a matrix that is large enough, and whose factors are smaller."""
        if len(shape) < 2 or not super().compresses(shape):
            return False
        return self.factor_size(shape) * self._min_saving < shape.numel()

    def factor_size(self, shape: torch.Size) -> int:
        """Return the numbers of both factors."""
        rows, columns = sides(shape)
        return self.rank_of(shape) * (rows + columns)

    def rank_of(self, shape: torch.Size) -> int:
        """Return the rank, or what a small matrix has of it."""
        return min(self.rank, *sides(shape))

    def wire_bytes(self, count: int, dtype: torch.dtype) -> int:
        """Return the bytes of numbers that are sent as they are."""
        return count * self.buffer_type(dtype).itemsize


def sides(shape: torch.Size) -> tuple[int, int]:
    """Return the rows and columns of the matrix that a tensor is taken for."""
    return shape[0], shape[1:].numel()


def split(message: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Return the matrices at the beginning of a message, and the rest of it."""
    sizes = [shape.numel() for shape in shapes]
    *parts, rest = torch.split_with_sizes(message, [*sizes, len(message) - sum(sizes)])
    return [*(part.view(shape) for part, shape in zip(parts, shapes, strict=True)), rest]


def orthonormal(matrices: Sequence[Tensor]) -> list[Tensor]:
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
