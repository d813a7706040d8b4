"""Many small tensors made equal on all ranks, by one all-reduce a kind; alone, or on the way beside the gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hvdtrain.models.private_torch import copy_all_
from hvdtrain.world.carriers import ReduceOp, distinct

if TYPE_CHECKING:
    from hvdtrain.world.collectives import Collectives

# A double holds integers up to 2^53 only.
_TYPES: dict[ReduceOp, torch.dtype] = {"mean": torch.float64, "max": torch.int64}


# Numbers that travel at a time, of many tensors.
_NUMBERS = 1 << 24


def average(world: Collectives, tensors: Sequence[Tensor], name: str) -> None:
    """Overwrite tensors with what `start_means` makes of them, some at a time: it takes much memory. Collective."""
    for number, some in enumerate(_in_turns(tensors)):
        start_means(world, some, f"{name}.{number}" if number else name)()


def _in_turns(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield neighbours that are averaged together: as many as fit, one that is larger by itself."""
    some: list[Tensor] = []
    room = _NUMBERS
    for tensor in tensors:
        if some and tensor.numel() > room:
            yield some
            some, room = [], _NUMBERS
        some.append(tensor)
        room -= tensor.numel()
    if some:
        yield some


@torch.no_grad()
def start_means(world: Collectives, tensors: Sequence[Tensor], name: str) -> Callable[[], None]:
    """Begin to average tensors; returns what waits, and overwrites them. Both are collective.

    Real and complex ones become their means over the ranks, in fp64, others the largest, as int64.
    """
    if world.size == 1:
        return lambda: None
    own = [distinct(tensor, name) if 0 in tensor.stride() else tensor for tensor in tensors]
    parts = [torch.view_as_real(tensor) if tensor.is_complex() else tensor for tensor in own]
    waits: list[tuple[list[Tensor], Callable[[], Tensor]]] = []
    for op, dtype in _TYPES.items():
        part = [tensor for tensor in parts if tensor.is_floating_point() == dtype.is_floating_point]
        if part:
            waits.append((part, world.start_all_reduce_(_joined(part, dtype), op, f"{name}.{op}")))

    @torch.no_grad()
    def finish() -> None:
        for part, wait in waits:
            total = wait()
            if _are_alike(part):
                total = total.to(part[0].dtype)
            values = torch.split(total, [tensor.numel() for tensor in part])
            copy_all_(part, [value.view(tensor.shape) for tensor, value in zip(part, values, strict=True)])

    return finish


def _joined(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Return all numbers as one tensor of this type; cast at once if they can be: on GPUs each cast is a kernel."""
    flat = [tensor.detach().reshape(-1) for tensor in tensors]
    return torch.cat(flat).to(dtype) if _are_alike(tensors) else torch.cat([part.to(dtype) for part in flat])


def _are_alike(tensors: Sequence[Tensor]) -> bool:
    return len({tensor.dtype for tensor in tensors}) == 1


class BesideGradients:
    """Tensors that are averaged while gradients are on the wire: `WrappedOptimizer.take_along`.

    They leave behind the last bucket of a step, so that nothing waits for them alone.

    Args:
        world: the ranks.
        name: of the collectives.
        tensors: returns what is averaged in this step, alike on all ranks; nothing where that is not known yet.
    """

    def __init__(self, world: Collectives, name: str, tensors: Callable[[], Sequence[Tensor]]) -> None:
        self._world, self._name, self._tensors = world, name, tensors
        self._finish: Callable[[], None] | None = None
        self._has_arrived = False

    @property
    def is_sent(self) -> bool:
        """Return whether they are on the wire."""
        return self._finish is not None

    def send(self) -> None:
        """Put them on the wire. Collective."""
        tensors = self._tensors()
        if tensors:
            self._finish = start_means(self._world, tensors, self._name)

    def receive(self) -> None:
        """Wait for the means. Collective."""
        if self._finish is not None:
            self._finish()
            self._finish, self._has_arrived = None, True

    def has_arrived(self) -> bool:
        """Return whether they were averaged since this was last asked."""
        arrived, self._has_arrived = self._has_arrived, False
        return arrived
