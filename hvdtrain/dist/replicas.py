"""Are the ranks bitwise equal? A digest of each tensor, computed where it lies, and the first that differs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

_CHUNK = 1 << 22
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def tensor_digest(tensor: Tensor) -> int:
    """Return 64 bits of a tensor's bits and their places; exact, so the same on every device.

    Each element, as an integer, is multiplied by an odd number that depends on its place, and all are added modulo
    2^64: a change of any one element changes the result.
    """
    flat = tensor.detach().contiguous().view(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).view(-1)
    bits = flat.view(_INTEGERS[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, len(bits), _CHUNK):
        chunk = bits[start : start + _CHUNK].to(torch.int64)
        places = torch.arange(start, start + len(chunk), device=tensor.device)
        # An odd multiplier for each place, from the odd constant of SplitMix64 (2^64 / golden ratio).
        total += (chunk * ((places * -7046029254386353131) | 1)).sum()
    return int(total)


def first_difference(digests: Sequence[Mapping[str, int]]) -> tuple[str, list[int]] | None:
    """Return the first name whose digest is not alike on all ranks, and the ranks that differ from rank 0."""
    for name in digests[0]:
        ranks = [rank for rank, own in enumerate(digests) if own.get(name) != digests[0][name]]
        if ranks:
            return name, ranks
    return None
