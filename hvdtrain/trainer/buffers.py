"""Buffers that training changes, such as running statistics: kept equal on all ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from hvdtrain.world import ReduceOp, World, digest_of


class ChangingBuffers:
    """Averages, after each step, the buffers that a step changes on any rank; found out in the first one.

    Each rank has moved them by its own samples. The mean is what their averages over all samples are; counts take the
    largest. Then all ranks are equal at the end of every step, and it matters not at which step a run is saved.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.names: list[str] | None = None
        """Of the buffers that change; None before the first step."""
        self._before = self._digests()

    def average(self, world: World) -> None:
        """Make changed buffers equal on all ranks, by one all-reduce a kind. Collective."""
        if world.size == 1 or not self._before:
            return
        if self.names is None:
            now = self._digests()
            changed = [name for name, digest in now.items() if digest != self._before.get(name)]
            everyone = world.all_gather_object(changed, "buffers.changed")
            self.names = [name for name in now if any(name in names for names in everyone)]
        buffers = dict(self._model.named_buffers())
        tensors = [buffers[name] for name in self.names]
        if not tensors:
            return
        real = [tensor for tensor in tensors if tensor.is_floating_point()]
        counts = [tensor for tensor in tensors if not tensor.is_floating_point()]
        parts: list[tuple[list[Tensor], ReduceOp]] = [(real, "mean"), (counts, "max")]
        waits = [(part, _start(world, part, op)) for part, op in parts if part]
        with torch.no_grad():
            for part, wait in waits:
                values = torch.split(wait(), [tensor.numel() for tensor in part])
                for tensor, value in zip(part, values, strict=True):
                    tensor.copy_(value.view(tensor.shape))

    def _digests(self) -> dict[str, int]:
        """Return what changes when a buffer does; its version counter does not tell: batch_norm leaves it alone."""
        return {name: int(digest_of(buffer)) for name, buffer in self._model.named_buffers()}


def _start(world: World, tensors: list[Tensor], op: ReduceOp) -> Callable[[], Tensor]:
    flat = torch.cat([tensor.detach().reshape(-1).double() for tensor in tensors])
    return world.start_all_reduce(flat, op, f"buffers.{op}")
