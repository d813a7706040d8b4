"""The parts of a checkpoint put together: what one file would hold, had one rank written it.

`state.pt` of such a checkpoint has, where the optimizer's state stands otherwise, the outline of it: the parameter
groups, and the shape and strides of each parameter. Each part has the pieces of its rank: from which number of a
parameter to which, in the order in which they lie in memory, and the state's entries for these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def check_parts(state: Mapping[str, Any], parts: Sequence[Any], step: int) -> None:
    """Make sure that parts can be put together; tensors are not read.

    Raises:
        ValueError: they are of another save, or do not fit together.
    """
    for rank, part in enumerate(parts):
        if not isinstance(part, dict) or (part.get("rank"), part.get("step")) != (rank, step):
            raise ValueError(f"the part of rank {rank} is not of this rank and step")
        if not isinstance(part.get("components"), dict):
            raise ValueError(f"the part of rank {rank} has no states of components")
    outline = state.get("optimizer")
    if isinstance(outline, Mapping) and "forms" in outline:
        for number, pieces in _pieces_of(parts).items():
            _check_pieces(number, pieces, outline["forms"][number])


def joined(state: Mapping[str, Any], parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the state as one rank would have saved it; `check_parts` has passed."""
    components = dict(state["components"])
    for name in dict.fromkeys(name for part in parts for name in part["components"]):
        components[name] = [part["components"].get(name, {}) for part in parts]
    outline = state["optimizer"]
    if "forms" in outline:
        found = _pieces_of(parts)
        entries = {number: _whole(found[number], outline["forms"][number]) for number in sorted(found)}
        others = {number: entry for number, entry in entries.items() if entry}
        outline = {"state": {**others, **outline["state"]}, "param_groups": outline["param_groups"]}
    return {**state, "components": components, "optimizer": outline}


def _pieces_of(parts: Sequence[Mapping[str, Any]]) -> dict[int, list[Mapping[str, Any]]]:
    """Return the pieces of each parameter, by its number, in their order."""
    found: dict[int, list[Mapping[str, Any]]] = {}
    for part in parts:
        for number, piece in part["optimizer"].items():
            found.setdefault(number, []).append(piece)
    return {number: sorted(pieces, key=lambda piece: piece["start"]) for number, pieces in found.items()}


def _check_pieces(number: int, pieces: Sequence[Mapping[str, Any]], form: tuple[Sequence[int], Sequence[int]]) -> None:
    shape, _ = form
    end, keys = 0, pieces[0]["entries"].keys()
    for piece in pieces:
        if piece["start"] != end or piece["end"] <= piece["start"] or piece["entries"].keys() != keys:
            raise ValueError(f"the pieces of parameter {number} do not fit together")
        end = piece["end"]
        for value in piece["entries"].values():
            is_cut = not piece["is_whole"] and isinstance(value, Tensor) and value.dim()
            if is_cut and value.shape != (piece["end"] - piece["start"],):
                raise ValueError(f"a piece of parameter {number} is of another length")
    if not pieces[0]["is_whole"] and end != torch.Size(shape).numel():
        raise ValueError(f"pieces of parameter {number} are missing")


def _whole(pieces: Sequence[Mapping[str, Any]], form: tuple[Sequence[int], Sequence[int]]) -> dict[str, Any]:
    """Return the entries of a parameter's state, from those of its pieces."""
    first = pieces[0]
    if first["is_whole"]:
        return dict(first["entries"])
    shape, strides = form
    entries: dict[str, Any] = {}
    for key, value in first["entries"].items():
        if not isinstance(value, Tensor) or not value.dim():
            entries[key] = value
            continue
        numbers = torch.empty(pieces[-1]["end"], dtype=value.dtype)
        for piece in pieces:
            numbers[piece["start"] : piece["end"]] = piece["entries"][key]
        entries[key] = numbers.as_strided(tuple(shape), tuple(strides))
    return entries
