"""Large buffers in huge pages of the CPU's memory."""

from __future__ import annotations

import contextlib
import mmap

import torch
from torch import Tensor

_PAGE = 2 << 20  # of x86 and of Arm with 4 KiB pages; elsewhere the kernel decides what it can do
# Less of a page would waste more memory than it gains time.
_SMALLEST = _PAGE // 8


def zeros(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return `torch.zeros`, `(count,)`, on CPUs in huge pages from 256 KiB on, where the kernel gives any (Linux).

    Another rank on the host reads and writes such a buffer through the kernel, which goes through it page by page:
    512 times as many of them are small. torch's own allocator gives small ones.
    """
    size = count * dtype.itemsize
    if device.type != "cpu" or size < _SMALLEST or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(count, dtype=dtype, device=device)
    # Anonymous, so that it is zero and takes no room before it is written to; whole pages, and one more, to begin where
    # one begins.
    memory = mmap.mmap(-1, -(-size // _PAGE) * _PAGE + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel built without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    first = -whole.data_ptr() % _PAGE
    return whole[first : first + size].view(dtype)
