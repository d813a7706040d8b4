"""Which gradients travel together."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

# As in PyTorch DDP: the first bucket is ready soon after backward has begun.
FIRST_BUCKET_BYTES = 1 << 20


def in_buckets(parameters: Sequence[nn.Parameter], bucket_bytes: int) -> list[list[nn.Parameter]]:
    """Split parameters into buckets of one type and device, in the reverse of the model's order.

    That is about the order in which backward finishes them. The same on every rank and in every run.
    """
    buckets: list[list[nn.Parameter]] = []
    room = min(FIRST_BUCKET_BYTES, bucket_bytes)
    for parameter in reversed(parameters):
        first = buckets[-1][0] if buckets else None
        fits = first is not None and (parameter.dtype, parameter.device) == (first.dtype, first.device)
        if not fits or room < parameter.nbytes:
            room = bucket_bytes if buckets else room
            buckets.append([])
        buckets[-1].append(parameter)
        room -= parameter.nbytes
    return buckets
