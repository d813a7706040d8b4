"""Whether all ranks step with the same learning rate: schedules that go by each rank's own loss drive them apart."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from hvdtrain.world.world import World

_log = logging.getLogger("hvdtrain")


class SettingsWatch:
    """Compares the settings of an optimizer's groups over the ranks, now and then, and warns where they differ.

    It travels behind the gradients of the 2nd, 4th, 8th, ... window: two numbers, which nothing waits for alone.

    Args:
        world: the ranks.
        optimizer: whose groups are compared.
        name: of the collective.
    """

    def __init__(self, world: World, optimizer: torch.optim.Optimizer, name: str) -> None:
        self._world, self._name = world, name
        self._optimizer = weakref.ref(optimizer)
        self._wait: Callable[[], bool] | None = None
        self._windows = 0
        self._is_over = False

    @property
    def is_sent(self) -> bool:
        """Return whether it is on the wire."""
        return self._wait is not None

    def send(self) -> None:
        """Send what tells one rank's settings from another's, where it is time. Collective."""
        self._windows += 1
        if self._is_over or self._windows < 2 or self._windows & (self._windows - 1):
            return
        self._wait = self._world.start_agreeing(self._settings(), self._name)

    def receive(self) -> None:
        """Compare, where it was sent. Collective."""
        if self._wait is None:
            return
        self._is_over, self._wait = not self._wait(), None
        if not self._is_over:
            return
        if self._world.rank == 0:
            rates = ", ".join(f"{group['lr']:.4g}" for group in self._settings() if isinstance(group.get("lr"), float))
            _log.warning(
                "the ranks' optimizers differ in their settings, such as the learning rate (%s on rank 0): weights go"
                " apart. What a schedule goes by must be the same on all ranks, as ReduceLROnPlateau's"
                ' step(world.all_reduce(loss.detach(), "mean"))',
                rates or "none",
            )

    def _settings(self) -> list[dict[str, Any]]:
        optimizer = self._optimizer()
        groups = [] if optimizer is None else optimizer.param_groups
        return [
            {key: plain for key, value in group.items() if (plain := _plain(value)) is not None} for group in groups
        ]


def _plain(value: Any) -> Any:
    """Return numbers, texts, and tuples of them; None for what is not compared, such as what lies on a GPU."""
    if isinstance(value, Tensor):
        return float(value) if value.numel() == 1 and value.is_cpu else None
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    return float(value) if isinstance(value, int | float) else value if isinstance(value, str) else None
