"""Messages between a rank and the processes that read its data: pickles, and tensors in memory that both see.

A message is its length and a pickle. Tensors of a batch do not travel in it: their bytes lie in a file in memory whose
descriptor goes along, so a large batch is neither pickled nor copied again by the rank. Such files do not count against
the size of /dev/shm, which containers make small.
"""

from __future__ import annotations

import mmap
import os
import pickle
import socket
import struct
import tempfile
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hvdtrain.data.nested import map_leaves, map_tensors, tensors_in

_LENGTH = struct.Struct("<Q")
_ALIGNMENT = 64


class _Slot:
    """Where a tensor lies in the memory that goes with a message: a leaf of the batch in its place.

    Args:
        start: its first byte.
        dtype: its type.
        shape: its shape.
    """

    __slots__ = ("dtype", "shape", "start")

    def __init__(self, start: int, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        self.start, self.dtype, self.shape = start, dtype, shape


class _Packed(NamedTuple):
    batch: Any
    """With `_Slot` in place of each tensor."""
    num_bytes: int


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
        Exception: whatever pickling what else the batch holds raises; nothing is sent then.
    """
    slots, end = [], 0
    tensors = [tensor.detach().contiguous() for tensor in tensors_in(batch) if _is_plain(tensor)]
    for tensor in tensors:
        slots.append(_Slot(end, tensor.dtype, tuple(tensor.shape)))
        end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    remaining = iter(slots)
    inner = map_tensors(lambda tensor: next(remaining) if _is_plain(tensor) else tensor.detach(), batch)
    send(connection, (head, _Packed(inner, end)))
    if end:
        descriptor = _memory(end)
        try:
            with mmap.mmap(descriptor, end) as memory:
                for slot, tensor in zip(slots, tensors, strict=True):
                    _view(memory, slot).copy_(tensor)
            socket.send_fds(connection, [b"m"], [descriptor])
        finally:
            os.close(descriptor)


def _is_plain(tensor: Tensor) -> bool:
    """Tell whether a tensor is what its numbers, type and shape say; sparse ones, say, are pickled."""
    is_own = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type == "cpu"
    return is_own and tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_nested


def receive_batch(connection: socket.socket) -> tuple[Any, Any]:
    """Return a head and the batch that came with it, whose memory is free again when its tensors are."""
    head, packed = receive(connection)
    if packed.num_bytes == 0:
        return head, packed.batch
    _, descriptors, _, _ = socket.recv_fds(connection, 1, 1)
    if not descriptors:
        raise EOFError
    (descriptor,) = descriptors
    try:
        memory = mmap.mmap(descriptor, packed.num_bytes)
    finally:
        os.close(descriptor)
    return head, _fill(packed.batch, memory)


def _fill(batch: Any, memory: mmap.mmap) -> Any:
    """Put tensors in place of slots."""
    return map_leaves(lambda leaf: _view(memory, leaf) if isinstance(leaf, _Slot) else leaf, batch)


def _view(memory: mmap.mmap, slot: _Slot) -> Tensor:
    count = 1
    for length in slot.shape:
        count *= length
    if count == 0:
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
