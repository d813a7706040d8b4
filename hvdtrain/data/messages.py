"""Messages between a rank and the processes that read its data: pickles, and tensors in memory that both see.

A message is its length and a pickle. Tensors of a batch do not travel in it, wherever in the batch they are: their
bytes lie in a file in memory whose descriptor goes along, so a large batch is neither pickled nor copied again by the
rank. Such files do not count against the size of /dev/shm, which containers make small.
"""

from __future__ import annotations

import io
import math
import mmap
import os
import pickle
import socket
import struct
import tempfile
from typing import Any, NamedTuple

import torch
from torch import Tensor

_LENGTH = struct.Struct("<Q")
_ALIGNMENT = 64


class _Slot(NamedTuple):
    """Where a tensor lies in the memory that goes with a message."""

    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class _Packed(NamedTuple):
    batch: bytes
    """A pickle, with the numbers of slots in place of tensors."""
    slots: list[_Slot]
    num_bytes: int


class _Pickler(pickle.Pickler):
    """Leaves plain tensors out, and keeps them."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: list[Tensor] = []
        self._places: dict[int, int] = {}
        self._given: list[Any] = []  # alive, or another object might have its id

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, Tensor) or not _is_plain(obj):
            return None
        if id(obj) not in self._places:
            self._places[id(obj)] = len(self.tensors)
            self._given.append(obj)
            self.tensors.append(obj.detach().contiguous())
        return self._places[id(obj)]


class _Unpickler(pickle.Unpickler):
    """Puts tensors back."""

    def __init__(self, raw: bytes, tensors: list[Tensor]) -> None:
        super().__init__(io.BytesIO(raw))
        self._tensors = tensors

    def persistent_load(self, pid: Any) -> Tensor:
        tensor: Tensor = self._tensors[pid]
        return tensor


def send(connection: socket.socket, message: Any) -> None:
    """Send something that can be pickled.

    Raises:
        OSError: nobody is there any more.
    """
    raw = pickle.dumps(message)
    connection.sendall(_LENGTH.pack(len(raw)) + raw)


def receive(connection: socket.socket) -> Any:
    """Return the next message.

    Raises:
        EOFError: the other side has closed.
    """
    (length,) = _LENGTH.unpack(_exactly(connection, _LENGTH.size))
    return pickle.loads(_exactly(connection, length))


def send_batch(connection: socket.socket, head: Any, batch: Any) -> None:
    """Send a small head and a batch, for `receive_batch`.

    Raises:
        Exception: whatever pickling the batch raises; nothing is sent then.
    """
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(batch)
    slots, end = [], 0
    for tensor in pickler.tensors:
        slots.append(_Slot(end, tensor.dtype, tuple(tensor.shape)))
        end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    send(connection, (head, _Packed(file.getvalue(), slots, end)))
    if end:
        descriptor = _memory(end)
        try:
            with mmap.mmap(descriptor, end) as memory:
                for slot, tensor in zip(slots, pickler.tensors, strict=True):
                    _view(memory, slot).copy_(tensor)
            socket.send_fds(connection, [b"m"], [descriptor])
        finally:
            os.close(descriptor)


def receive_batch(connection: socket.socket) -> tuple[Any, Any]:
    """Return a head and the batch that came with it, whose memory is free again when its tensors are."""
    head, packed = receive(connection)
    if packed.num_bytes == 0:
        return head, _unpacked(packed, None)
    _, descriptors, _, _ = socket.recv_fds(connection, 1, 1)
    if not descriptors:
        raise EOFError
    (descriptor,) = descriptors
    try:
        memory = mmap.mmap(descriptor, packed.num_bytes)
    finally:
        os.close(descriptor)
    return head, _unpacked(packed, memory)


def _unpacked(packed: _Packed, memory: mmap.mmap | None) -> Any:
    return _Unpickler(packed.batch, [_view(memory, slot) for slot in packed.slots]).load()


def _is_plain(tensor: Tensor) -> bool:
    """Tell whether a tensor is what its numbers, type and shape say; sparse ones, say, are pickled."""
    is_own = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type == "cpu"
    return is_own and tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_nested


def _view(memory: mmap.mmap | None, slot: _Slot) -> Tensor:
    count = math.prod(slot.shape)
    if count == 0 or memory is None:
        return torch.empty(slot.shape, dtype=slot.dtype)
    return torch.frombuffer(memory, dtype=slot.dtype, count=count, offset=slot.start).view(slot.shape)


def _memory(num_bytes: int) -> int:
    """Return the descriptor of a file of so many bytes that has no name."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("hvdtrain-batch", os.MFD_CLOEXEC)
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, num_bytes)
    return descriptor


def _exactly(connection: socket.socket, num_bytes: int) -> bytearray:
    raw = bytearray(num_bytes)
    view = memoryview(raw)
    while view:
        count = connection.recv_into(view)
        if count == 0:
            raise EOFError
        view = view[count:]
    return raw
