"""`SoloWorld`: one process on its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from hvdtrain.process.launch import Launch
from hvdtrain.process.progress import Progress
from hvdtrain.world.carriers import ReduceOp
from hvdtrain.world.world import World

T = TypeVar("T")


class SoloWorld(World):
    """One process, on its own; Horovod need not be installed."""

    def __init__(self, device: torch.device, launch: Launch) -> None:
        self.device = device
        self.launch = launch
        self.progress = Progress()

    def start_all_reduce_(self, tensor: Tensor, op: ReduceOp | Literal["adasum"], name: str) -> Callable[[], Tensor]:
        """Return a function that returns `tensor`."""
        return lambda: tensor

    def start_broadcast_(self, tensor: Tensor, name: str, root: int = 0) -> Callable[[], Tensor]:
        """Return a function that returns `tensor`."""
        return lambda: tensor

    def start_all_gather(self, tensor: Tensor, name: str) -> Callable[[], Tensor]:
        """Return a function that returns a copy."""
        result = tensor.clone()
        return lambda: result

    def start_all_to_all(self, tensor: Tensor, name: str) -> Callable[[], Tensor]:
        """Return a function that returns a copy."""
        result = tensor.clone()
        return lambda: result

    def all_reduce_among(self, ranks: tuple[int, ...], tensor: Tensor, name: str, op: ReduceOp = "sum") -> Tensor:
        """Return a copy."""
        return tensor.clone()

    def broadcast_pickled(self, value: Any, name: str, root: int) -> Any:
        """Return `value`."""
        return value

    def all_gather_pickled(self, value: T, name: str) -> list[T]:
        """Return `value` as the only one."""
        return [value]
