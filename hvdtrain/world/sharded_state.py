"""The state of a sharded optimizer put together on rank 0, and cut again: checkpoints hold it undivided.

So they load with and without sharding, and on any number of ranks. It travels bucket by bucket and parameter by
parameter: rank 0 alone holds all of it, once, in host memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hvdtrain.world.filling import flat, like
from hvdtrain.world.pieces import Cut, Part, Piece

if TYPE_CHECKING:
    from hvdtrain.world.world import World


@dataclass(frozen=True)
class _Form:
    """Stands for a tensor that is sent by itself."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def part_of(part: Part, value: Any) -> Any:
    """Return what a rank keeps of an entry of a parameter's state: numbers that belong to elements are cut."""
    own = part.parameter
    if part.is_whole or not isinstance(value, Tensor) or value.dim() == 0 or value.shape != own.shape:
        return value
    laid_out = torch.empty_like(own, dtype=value.dtype, device=value.device).copy_(value)
    return flat(laid_out)[part.start : part.end].clone()


def whole_of(
    world: World, cuts: Sequence[Cut], numbers: Mapping[nn.Parameter, int], own: Mapping[int, dict[str, Any]]
) -> dict[int, dict[str, Any]]:
    """Return every parameter's state, by its number, on rank 0; nothing on others. Collective.

    Args:
        world: the ranks.
        cuts: the buckets.
        numbers: of the parameters, in the optimizer.
        own: what this rank has of each.
    """
    forms = {number: {key: _form(value) for key, value in entries.items()} for number, entries in own.items()}
    of_ranks = world.all_gather_object(forms, "sharded.forms")
    state: dict[int, dict[str, Any]] = {}
    for number in sorted({number for one in of_ranks for number in one}):
        entries = next(one[number] for one in of_ranks if number in one)
        state[number] = {key: None if isinstance(value, _Form) else value for key, value in entries.items()}
    for i, cut in enumerate(cuts):
        parts = [[(part, numbers[part.parameter]) for part, _ in cut.parts(rank)] for rank in range(world.size)]
        entries_of = [
            [
                (part, number, key, form)
                for part, number in of_rank
                for key, form in of_ranks[rank][number].items()
                if isinstance(form, _Form)
            ]
            for rank, of_rank in enumerate(parts)
        ]
        for dtype in sorted({form.dtype for of_rank in entries_of for *_, form in of_rank}, key=str):
            chosen = [[item for item in of_rank if item[3].dtype == dtype] for of_rank in entries_of]
            mine = [
                own[number][key].detach().reshape(-1).to(cut.parameters[0].device)
                for _, number, key, _ in chosen[world.rank]
            ]
            empty = torch.zeros(0, dtype=dtype, device=cut.parameters[0].device)
            gathered = world.all_gather(torch.cat(mine) if mine else empty, f"sharded.state.{i}.{dtype}")
            if world.rank == 0:
                _put(state, [item for of_rank in chosen for item in of_rank], gathered.cpu())
    return {number: entries for number, entries in state.items() if entries} if world.rank == 0 else {}


def _form(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _Form(tuple(value.shape), value.dtype) if value.dim() else value.detach().cpu().clone()
    return value


def _put(state: dict[int, dict[str, Any]], items: Sequence[tuple[Part, int, str, _Form]], gathered: Tensor) -> None:
    """Write parts that lie one after the other into the tensors that they belong to."""
    offset = 0
    for part, number, key, form in items:
        count = torch.Size(form.shape).numel()
        values, own = gathered[offset : offset + count], part.parameter
        offset += count
        if part.is_whole:
            state[number][key] = values.view(form.shape).clone()
            continue
        if state[number][key] is None:
            state[number][key] = like(torch.empty(own.numel(), dtype=form.dtype), own)
        flat(state[number][key])[part.start : part.end] = values


class State:
    """A whole state that rank 0 has read, on its way to the ranks. Collective.

    Args:
        world: the ranks.
        whole: on rank 0, as the undivided optimizer's `state_dict()` has it.
    """

    def __init__(self, world: World, whole: Mapping[str, Any] | None) -> None:
        self._world = world
        self._tensors: dict[Any, dict[str, Tensor]] = {}
        outline = None
        if world.rank == 0:
            assert whole is not None
            entries = {number: self._outline(number, value) for number, value in whole["state"].items()}
            outline = {"state": entries, "param_groups": whole["param_groups"]}
        self._outlined: Any = world.broadcast_object(outline, "sharded.outline")

    def _outline(self, number: Any, entries: Any) -> Any:
        if not isinstance(entries, Mapping):
            return entries
        self._tensors[number] = {
            key: value.contiguous() for key, value in entries.items() if isinstance(value, Tensor) and value.dim()
        }
        return {
            key: _Form(tuple(value.shape), value.dtype) if key in self._tensors[number] else value
            for key, value in entries.items()
        }

    def part(
        self, parameters: Sequence[nn.Parameter], pieces: Sequence[Sequence[Piece]], sizes: Sequence[int]
    ) -> dict[str, Any]:
        """Return this rank's part, as `load_state_dict` takes it. Collective.

        Args:
            parameters: the undivided optimizer's, in its order.
            pieces: this rank's, of each group in order.
            sizes: of the undivided groups.
        """
        groups = self._outlined["param_groups"]
        if [len(group["params"]) for group in groups] != list(sizes):
            return {"state": {}, "param_groups": []}
        own = [piece for of_group in pieces for piece in of_group]
        place = {piece.part.parameter: i for i, piece in enumerate(own)}
        state: dict[Any, Any] = {}
        for number, entries in self._outlined["state"].items():
            if not isinstance(number, int):
                state[number] = entries
                continue
            received = self._received(number, entries)
            at = place.get(parameters[number])
            if at is not None:
                state[at] = {key: part_of(own[at].part, value) for key, value in received.items()}
        start, local = 0, []
        for group, of_group in zip(groups, pieces, strict=True):
            named = {key: value for key, value in group.items() if key != "param_names"}
            local.append({**named, "params": list(range(start, start + len(of_group)))})
            start += len(of_group)
        return {"state": state, "param_groups": local}

    def _received(self, number: int, entries: Mapping[str, Any]) -> dict[str, Any]:
        """Return a parameter's whole state: its tensors are sent, on rank 0 taken as they are."""
        forms = {key: value for key, value in entries.items() if isinstance(value, _Form)}
        tensors = self._tensors.get(number) or {k: torch.empty(f.shape, dtype=f.dtype) for k, f in forms.items()}
        if tensors:
            self._world.broadcast_tensors(tensors, "sharded.restore")
        return {key: tensors.get(key, value) for key, value in entries.items()}
