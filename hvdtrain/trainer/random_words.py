"""Random bits as a function of a key and a place: what each sample draws."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

GOLDEN = -7046029254386353131  # 2^64 / golden ratio, odd, as a signed number


def mix64(x: Tensor) -> Tensor:
    """Mix int64 (the finalizer of SplitMix64: Steele, Lea and Flood, OOPSLA 2014, section 3)."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * -4658895280553007687
    x = (x ^ ((x >> 27) & (2**37 - 1))) * -7723592293110705685
    return x ^ ((x >> 31) & (2**33 - 1))


def _mix32(x: Tensor) -> Tensor:
    """Mix int32 in place (the finalizer of MurmurHash3, Appleby 2011, public domain)."""
    x ^= (x >> 16) & 0xFFFF
    x *= -2048144789
    x ^= (x >> 13) & 0x7FFFF
    x *= -1028477387
    x ^= (x >> 16) & 0xFFFF
    return x


_STRIDE = -1640531535  # 2^32 / golden ratio, odd, as a signed number


def words(keys: Tensor, shape: Sequence[int]) -> Tensor:
    """Return 32 random bits for each element, int32 of this shape `(n, ...)`; `keys` are int64 `(n,)`."""
    x = _places(shape[1:], keys.device).flatten() ^ keys.to(torch.int32)[:, None]
    x = _mix32(_mix32(x) + (keys >> 32).to(torch.int32)[:, None])
    return x.view(tuple(shape))


def _places(shape: Sequence[int], device: torch.device) -> Tensor:
    """Return a number for each place in a sample's own tensor, int32 of this shape, whatever the sizes in it are.

    So what a sample draws does not depend on how far it is padded, nor on what else is in its micro-batch. Multiples of
    the stride lie far apart (Steinhaus' three-distance theorem): rows do not run into each other.
    """
    places = torch.zeros((), dtype=torch.int32, device=device)
    stride = 1
    for axis, size in enumerate(reversed(shape)):
        steps = torch.arange(size, dtype=torch.int32, device=device) * stride
        places = places + steps.view(size, *(1,) * axis)
        stride = (stride * _STRIDE + 2**31) % 2**32 - 2**31
    return places
