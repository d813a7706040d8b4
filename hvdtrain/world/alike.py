"""Whether all ranks have made the same: what differs is averaged with something else, in silence, or waited for."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hvdtrain.errors import ConfigError, on_all_ranks

if TYPE_CHECKING:
    from hvdtrain.world.averaging import Averaging
    from hvdtrain.world.world import World

_log = logging.getLogger("hvdtrain")
Row = tuple[str, str]
"""A tensor's name, and what it is."""


def rows_of(tensors: Iterable[tuple[str, Tensor]], learning: bool = False) -> list[Row]:
    """Return what must be alike on all ranks of tensors, in their order; if `learning`, also what is frozen."""
    return [
        (name, f"{tuple(item.shape)} {item.dtype}{', frozen' if learning and not item.requires_grad else ''}")
        for name, item in tensors
    ]


def check_same(world: World, rows: Sequence[Row], call: str, settings: Mapping[str, object] | None = None) -> None:
    """Make sure that all ranks have the same tensors in the same order, and the same settings. Collective.

    Args:
        world: the ranks.
        rows: of this rank's tensors.
        call: names what they were given to, in messages and to the other ranks.
        settings: that count, by name.

    Raises:
        ConfigError: they have not; says what differs, and on which rank. On all ranks.
    """
    own = [*(settings or {}).items(), *rows]
    if world.agrees(own, f"{call}.alike"):
        return
    everyone: list[list[tuple[str, Any]]] = world.all_gather_object(own, f"{call}.all")
    rank, others = next((rank, others) for rank, others in enumerate(everyone) if others != everyone[0])
    theirs, ours = next((a, b) for a, b in zip_longest(others, everyone[0]) if a != b)
    raise on_all_ranks(
        ConfigError(
            f"{call}: rank {rank} has {_shown(theirs)} where rank 0 has {_shown(ours)}. Have all ranks make the same,"
            " in the same order: what goes through a set comes in another order in each process"
        )
    )


def check_same_wrap(
    world: World, named: Sequence[tuple[str, Tensor]], owned: Sequence[Tensor], kind: str, averaging: Averaging
) -> None:
    """Make sure that all ranks wrap the same parameters in the same way. Collective.

    Says so where they stand in another order within the optimizer, which its state is numbered by.

    Args:
        world: the ranks.
        named: the parameters that are averaged, in the order in which they travel.
        owned: the same, in the optimizer's order.
        kind: the optimizer's class.
        averaging: how.

    Raises:
        ConfigError: they do not.
    """
    fields = dataclasses.asdict(dataclasses.replace(averaging, compression="none"))
    settings = {**fields, "compression": averaging.codec().name, "optimizer": kind}
    check_same(world, rows_of(named, learning=True), f"wrap() number {world.num_wraps}", settings)
    names = {parameter: name for name, parameter in named}
    if not world.agrees([names[item] for item in owned], f"wrap() number {world.num_wraps}.order") and not world.rank:
        _log.warning(
            "the parameters of this %s stand in another order on other ranks: one rank's state does not fit another"
            " one, nor a saved one the next run. Give it a list instead of a set",
            kind,
        )


def _shown(row: tuple[str, Any] | None) -> str:
    if row is None:
        return "nothing"
    name, value = row
    return f"{name} {value}" if isinstance(value, str) and value.startswith("(") else f"{name} = {value!r}"
