"""Which rank copies and writes which parameter's state of an optimizer that all ranks have whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hvdtrain.trainer.component import nested_tensors


def shared_out(
    state: Mapping[str, Any], rank: int, size: int, weights_bytes: int
) -> tuple[dict[str, Any], dict[int, Any]]:
    """Return the outline of an optimizer's state, and this rank's part, as `rundir.joined` puts them together.

    The largest first, always to the rank that has the least to copy: alike on all ranks, without asking.

    Args:
        state: what its `state_dict()` returned.
        rank: whose part.
        size: of the world.
        weights_bytes: what rank 0 copies besides.
    """
    entries = state.get("state")
    if not isinstance(entries, Mapping) or not all(isinstance(entry, Mapping) for entry in entries.values()):
        return dict(state), {}  # a form of the class's own: rank 0 writes it
    sizes = {
        number: sum(tensor.nbytes for tensor in nested_tensors(entry).values())
        for number, entry in entries.items()
        if isinstance(number, int)
    }
    load, own = [weights_bytes, *[0] * (size - 1)], {}
    for number in sorted(sizes, key=lambda number: (-sizes[number], number)):
        owner = min(range(size), key=lambda rank: load[rank])
        load[owner] += sizes[number]
        if owner == rank:
            own[number] = {"start": 0, "end": 1, "is_whole": True, "entries": dict(entries[number])}
    others = {key: value for key, value in entries.items() if key not in sizes}
    forms: dict[int, Any] = dict.fromkeys(sizes, ((), ()))  # whole, an entry has its own
    return {**state, "state": others, "forms": forms}, own
