"""Best-fit packing: pieces of text put whole into samples of one length (arXiv:2404.10830, section 3.2)."""

from __future__ import annotations

import bisect

import numpy as np
from numpy.typing import NDArray


def pack_best_fit(lengths: NDArray[np.int64], capacity: int) -> list[list[int]]:
    """Return samples as the numbers of the pieces in each.

    The longest piece comes first, each into the fullest sample that has room for it.

    Args:
        lengths: int64 `(pieces,)`, 1 to `capacity` each.
        capacity: tokens of a sample.

    Example:
        >>> pack_best_fit(np.array([3, 5, 2, 6]), 8)
        [[3, 2], [1, 0]]
    """
    samples: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # samples by the room that is left in them
    rooms: list[int] = []  # of which there are any, sorted
    for piece in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[piece])
        at = bisect.bisect_left(rooms, length)
        if at == len(rooms):
            room, sample = capacity, len(samples)
            samples.append([])
        else:
            room = rooms[at]
            sample = with_room[room].pop()
            if not with_room[room]:
                del rooms[at]
        samples[sample].append(piece)
        left = room - length
        if left:
            if not with_room[left]:
                bisect.insort(rooms, left)
            with_room[left].append(sample)
    return samples
