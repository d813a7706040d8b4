"""What a backward pass has finished: buckets that are complete take their gradients in, and the order is noted."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn

from hvdtrain.world.buckets import Bucket

if TYPE_CHECKING:
    from hvdtrain.world.averaging import Averaging
    from hvdtrain.world.layout import Layout

# More weights than these are seldom joined. What a user holds stays held.
_TRIES = 6


class Arrivals:
    """Follows the backward passes of one exchange, where that is asked for.

    Args:
        averaging: says what is asked for.
        devices: where the parameters are.
    """

    def __init__(self, averaging: Averaging, devices: set[torch.device]) -> None:
        is_plain = averaging.op == "average" and not averaging.shard
        self._takes_in = averaging.gradient_as_bucket_view and is_plain
        # Of several devices autograd's threads finish gradients in no order that repeats.
        self.finished: dict[nn.Parameter, None] | None = (
            {} if averaging.follows_backward and is_plain and len(devices) <= 1 else None
        )
        """Parameters in the order in which backward has last added to them; None: not noted, or no longer."""
        self._complete: dict[Bucket, int] = {}
        """How many of a bucket's parameters this pass has finished."""
        self._held: dict[Bucket, int] = {}
        """They have taken in all but what autograd has held, which is free when the next gradient arrives, or those of
        the weights that were joined with theirs have; how often that is still tried."""

    @staticmethod
    def of(averaging: Averaging, parameters: Iterable[nn.Parameter]) -> Arrivals | None:
        """Return one, or None where there is nothing to follow."""
        found = Arrivals(averaging, {parameter.device for parameter in parameters})
        return found if found._takes_in or found.finished is not None else None

    def note(self, parameter: nn.Parameter, bucket: Bucket, count: int, expected: int) -> None:
        """Note that backward has added to a gradient for the `count`-th time in this pass, of `expected`."""
        if self.finished is not None:
            self.finished.pop(parameter, None)
            self.finished[parameter] = None
        if not self._takes_in:
            return
        for held, tries in [*self._held.items()]:
            if held.takes_in and held.parameters[0].device == parameter.device and held.take_in() and tries > 1:
                self._held[held] = tries - 1
            else:
                del self._held[held]
        if count == expected and bucket.takes_in:
            arrived = self._complete[bucket] = self._complete.get(bucket, 0) + 1
            if arrived == bucket.num_learning and bucket.take_in():
                self._held[bucket] = _TRIES

    def end_pass(self, buckets: Iterable[Bucket]) -> None:
        """Take in what is left of a pass after which nothing is sent."""
        self.forget()
        for bucket in buckets if self._takes_in else ():
            if bucket.takes_in:
                bucket.take_in()

    def forget(self) -> None:
        """Begin a pass."""
        self._complete.clear()
        self._held.clear()

    def agree(self, layout: Layout) -> Arrivals | None:
        """Take rank 0's order for all, once it has had a backward pass; returns who goes on to follow. Collective."""
        if self.finished is None:
            return self
        order = layout.agreed([*self.finished])
        if not order:
            return self
        layout.follow(order)
        return self.without_order()

    def without_order(self) -> Arrivals | None:
        """Note the order no longer; returns None where there is nothing left to follow."""
        self.finished = None
        return self if self._takes_in else None
