"""Page-locked host memory, from which and to which a GPU copies by itself while the host goes on.

torch rounds each tensor of it up to the next power of two of bytes: what is large and stays, such as an optimizer's
state, would take up to twice as much of the host. Here it lies side by side in few large blocks. And where no more can
be had, as under WSL or a limit of the system, copies merely wait.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor

_log = logging.getLogger("hvdtrain")

# Smaller tensors are torch's to allocate, which keeps them for whoever comes next.
SMALL_BYTES = 1 << 20
# Blocks double until they are this large: no more than that is taken in vain.
LARGEST_BLOCK_BYTES = 1 << 29
_ALIGNMENT = 256
_said: list[bool] = []
"""Not empty: it was said that there is none."""


def pinned(tensor: Tensor) -> Tensor:
    """Return a copy in page-locked memory of a tensor in host memory; a sparse one, and one of a device, as it is.

    It lies without gaps, whatever the tensor is a part of: to copy one that has gaps, torch would first make another
    that has none in common memory, and the copy would wait for all that the GPU has to do.
    """
    if tensor.device.type != "cpu" or tensor.layout != torch.strided:
        return tensor
    try:
        return torch.empty_like(tensor, pin_memory=True).copy_(tensor)
    except RuntimeError as error:
        _say(error)
        return tensor


class PinnedMemory:
    """Gives out memory of tensors that stay for long; a block goes when all of its tensors have.

    Args:
        pins: whether it is page-locked: for tensors that a GPU reads and writes.
    """

    def __init__(self, pins: bool) -> None:
        self._pins = pins
        self._blocks: list[tuple[Tensor, int]] = []
        """Those that have room, and how much of each is taken."""
        self.taken_bytes = 0
        """Of all blocks together."""

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a contiguous tensor in host memory, whose numbers are whatever was there."""
        count = math.prod(shape)
        num_bytes = count * dtype.itemsize
        if num_bytes < SMALL_BYTES or not self._pins:
            return _empty(shape, dtype, self._pins)
        block, start = self._room_for(num_bytes)
        # A storage of its own, so that whoever writes it to a file does not write the whole block.
        own: Tensor = torch.frombuffer(block.numpy(), dtype=dtype, count=count, offset=start)
        return own.view(*shape)

    def empty_like(self, tensor: Tensor) -> Tensor:
        """Return one of a tensor's type and shape that lies in memory as the tensor does, if that has no gaps."""
        strides = torch.empty_like(tensor, device="meta").stride()
        return self.empty((tensor.numel(),), tensor.dtype).as_strided(tensor.shape, strides)

    def _room_for(self, num_bytes: int) -> tuple[Tensor, int]:
        """Return a block and where in it there is room, which is taken then."""
        needed = -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        found = next((pair for pair in self._blocks if len(pair[0]) - pair[1] >= needed), None)
        if found is None:
            usual = min(LARGEST_BLOCK_BYTES, max(self.taken_bytes, 4 * SMALL_BYTES))
            size = 1 << (max(needed, usual) - 1).bit_length()
            found = _empty((size,), torch.uint8, self._pins), 0
            self.taken_bytes += size
        block, start = found
        others = [pair for pair in self._blocks if pair[0] is not block]
        end = start + needed
        # Of one that is full, its tensors alone keep it.
        self._blocks = [*others, (block, end)] if len(block) - end >= SMALL_BYTES else others
        return block, start


def _empty(shape: Sequence[int], dtype: torch.dtype, pins: bool) -> Tensor:
    if pins:
        try:
            return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=True)
        except RuntimeError as error:
            _say(error)
    return torch.empty(shape, dtype=dtype, device="cpu")


def _say(error: RuntimeError) -> None:
    if not _said:
        _said.append(True)
        _log.warning(
            "no page-locked host memory can be had (%s): what is copied between GPU and host is waited for",
            str(error).partition("\n")[0],
        )
