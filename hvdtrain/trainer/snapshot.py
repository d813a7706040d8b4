"""The state of a training on its way from a GPU to host memory, by a stream beside the one that computes.

The host waits for nothing, and the GPU only where it would change what is still being read: what a step may change at
any time is copied first, and waited for; weights and the optimizer's state, which an update alone changes, are copied
while the next step's gradients are computed. Host memory is page-locked, and kept from one save to the next.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from hvdtrain.data.pinned import PinnedMemory


def to_host(tensor: Tensor) -> Tensor:
    """Return a copy that lies in host memory and changes no more."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu").copy_(tensor.detach())


class Snapshot:
    """Copies of tensors, one set at a time.

    Args:
        device: on which most of them lie.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams: Any = torch.get_device_module(device)
        self._stream: Any = self._streams.Stream()
        self._given: list[tuple[Tensor, Tensor]] = []
        """What is to be copied, and where to."""
        self._memory = PinnedMemory(device.type == "cuda")
        self._targets: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = {}
        """Memory of the set before that the new one has not taken."""
        self._arrived: Any = None
        self._is_held = True

    def begin(self) -> None:
        """Begin a new set: whoever had the last one is through with it."""
        self._targets = {}
        for _, target in self._given:
            self._targets.setdefault((target.shape, target.dtype), []).append(target)
        self._given, self._arrived, self._is_held = [], None, True

    def take(self, tensor: Tensor) -> Tensor:
        """Return where a copy will be, in host memory; what is elsewhere than on the device is copied at once."""
        if tensor.device.type != self._device.type:
            return to_host(tensor)
        kept = self._targets.get((tensor.shape, tensor.dtype))
        target = kept.pop() if kept else self._memory.empty(tensor.shape, tensor.dtype)
        self._given.append((tensor.detach(), target))
        return target

    def start(self, resting: Iterable[Tensor] = ()) -> None:
        """Have the copies made. What the current stream does from now on changes none of them.

        Args:
            resting: what nothing changes until `hold` was called; it is copied last.
        """
        self._targets = {}
        places = {tensor.untyped_storage().data_ptr() for tensor in resting}
        late: list[tuple[Tensor, Tensor]] = []
        soon: list[tuple[Tensor, Tensor]] = []
        for pair in self._given:
            (late if pair[0].untyped_storage().data_ptr() in places else soon).append(pair)
        self._stream.wait_stream(self._streams.current_stream())
        with self._streams.stream(self._stream):
            first = self._copy(soon)
            self._arrived = self._copy(late) if late else first
        first.wait()
        self._is_held = not late

    def _copy(self, pairs: list[tuple[Tensor, Tensor]]) -> Any:
        """Copy on the stream that is current, and return the event behind it."""
        for source, target in pairs:
            target.copy_(source, non_blocking=True)
        event = self._streams.Event()
        event.record()
        return event

    def hold(self) -> None:
        """Have the current stream wait for the copies: what comes after may change everything. The host goes on."""
        if not self._is_held:
            self._arrived.wait()
            self._is_held = True

    def arrive(self) -> None:
        """Wait, in the thread that calls, until the copies are there."""
        if self._arrived is not None:
            # A new thread is on GPU 0 until it says otherwise: asking for the event, the process would begin to use
            # that one, too, which takes half a gigabyte of it for each rank.
            self._streams.set_device(self._device)
            self._arrived.synchronize()
        # What was copied may be freed now; the memory that it was copied to stays.
        self._given = [(target, target) for _, target in self._given]
