"""Collectives that gradients pass through, so that N ranks train as one process does: also twice, and so on.

Each rank differentiates a loss of its own, and the optimizer takes the mean over the ranks. A tensor that has reached
the losses of all ranks therefore gets the sum of what these have for it. (Horovod's allgather takes their mean: its
gradients are those of one process divided by the number of ranks.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from hvdtrain.errors import UsageError

if TYPE_CHECKING:
    from hvdtrain.world.collectives import Collectives


def summed(tensor: Tensor, world: Collectives, name: str) -> Tensor:
    """Return the sum over the ranks, of the same shape and type. Collective, and so is its backward."""
    return cast(Tensor, _Summed.apply(tensor, world, name))  # type: ignore[no-untyped-call]


def reduced(tensor: Tensor, op: str, world: Collectives, name: str) -> Tensor:
    """Return the sum or the mean over the ranks. Collective, and so is its backward.

    Raises:
        UsageError: something else is asked for.
    """
    if op not in ("sum", "mean"):
        raise UsageError(f"'{name}': no gradient flows through a reduction by {op}, but through sum and mean")
    total = summed(tensor, world, name)
    return total / world.size if op == "mean" else total


def gathered(tensor: Tensor, world: Collectives, name: str) -> Tensor:
    """Return the ranks' rows, `(n, ...)`, one after the other, `(sum of n, ...)`. Collective, and so is its backward.

    The numbers of rows travel in a collective of their own.
    """
    lengths = world.all_gather(torch.tensor([len(tensor)], device="cpu"), f"{name}.lengths").tolist()
    return cast(Tensor, _Gathered.apply(tensor, world, name, lengths))  # type: ignore[no-untyped-call]


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, world: Collectives, name: str) -> Tensor:
        ctx.world, ctx.name = world, name
        return world.all_reduce(tensor, "sum", name)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return summed(gradient, ctx.world, f"{ctx.name}.gradient"), None, None


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, world: Collectives, name: str, lengths: Sequence[int]) -> Tensor:
        ctx.world, ctx.name, ctx.lengths = world, name, lengths
        return world.all_gather(tensor, name)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        name = f"{ctx.name}.gradient"
        own = cast(Tensor, _OwnRows.apply(gradient, ctx.world, name, ctx.lengths))  # type: ignore[no-untyped-call]
        return own, None, None, None


class _OwnRows(torch.autograd.Function):
    """Sums rows over the ranks, and keeps this rank's: the transpose of `_Gathered`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, world: Collectives, name: str, lengths: Sequence[int]) -> Tensor:
        ctx.world, ctx.name, ctx.lengths = world, name, lengths
        if len(set(lengths)) == 1 and len(rows):  # half of what an all-reduce moves
            return world.reduce_scatter(rows, "sum", name)
        return torch.split(world.all_reduce(rows, "sum", name), list(lengths))[world.rank].clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        name = f"{ctx.name}.gradient"
        rows = cast(Tensor, _Gathered.apply(gradient, ctx.world, name, ctx.lengths))  # type: ignore[no-untyped-call]
        return rows, None, None, None
