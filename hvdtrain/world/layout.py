"""Which buckets there are: laid out for what is trainable, and anew when that changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Protocol
from zlib import crc32

import torch
from torch import nn

from hvdtrain.models.walk import are_same
from hvdtrain.world.buckets import AdasumTensor, Bucket, in_buckets
from hvdtrain.world.codec import AsTheyAre, Codec
from hvdtrain.world.copies import CopyWatch
from hvdtrain.world.filling import real
from hvdtrain.world.question import Question
from hvdtrain.world.sparse_rows import SparseRows

if TYPE_CHECKING:
    from hvdtrain.world.averaging import Averaging
    from hvdtrain.world.world import World


# A prime: of so many layouts, as good as none looks like another.
_SIGNS = 61


class Travelling(Protocol):
    """What leaves in a step and is waited for."""

    @property
    def is_sent(self) -> bool:
        """Return whether it is on the wire."""

    def send(self) -> None:
        """Put it on the wire. Collective."""

    def receive(self) -> None:
        """Wait for it. Collective."""


class Layout:
    """The parts in which an optimizer's gradients travel, alike on all ranks.

    Args:
        world: the ranks.
        prefix: of the names of its collectives.
        parameters: returns the optimizer's parameters, in the model's order.
        names: of the model's parameters.
        sparse: parameters whose gradients are sparse.
        averaging: how they are averaged.
        codec: what gradients become on the wire.
    """

    def __init__(
        self,
        world: World,
        prefix: str,
        parameters: Callable[[], Iterable[nn.Parameter]],
        names: dict[nn.Parameter, str],
        sparse: set[nn.Parameter],
        averaging: Averaging,
        codec: Codec,
    ) -> None:
        self.buckets: list[Bucket] = []
        self.bucket_of: dict[nn.Parameter, Bucket] = {}
        self.sparse: list[SparseRows] = []
        self.question = Question()
        """Travels with the first bucket."""
        self.in_common: dict[int, list[tuple[Bucket, int]]] = {}
        """Where gradients that were sent early lie in memory with others, as in one buffer for all of them."""
        self.companions: list[Travelling] = []
        """What else leaves in every step, behind the gradients."""
        self._current: list[nn.Parameter] = []
        """Exactly what is laid out, in the order in which it was given; empty where that is not known."""
        self._world = world
        self._prefix = prefix
        self._parameters = parameters
        self._names = names
        self._is_sparse = sparse
        self._averaging = averaging
        self._codec = codec
        self.order: list[str] = []
        """Names of parameters in the order in which backward finishes them; empty: the reverse of the model's."""
        self._has_new_order = False
        is_watched = averaging.warns_of_copies and world.rank == 0 and type(codec) is AsTheyAre
        is_plain = averaging.op == "average" and not averaging.gradient_as_bucket_view and not averaging.shard
        self._copies = [CopyWatch(world, parameters)] if is_watched and is_plain else []

    @property
    def parts(self) -> Sequence[Travelling]:
        """Return all of them, in the order in which they are sent."""
        watches = (watch for watch in self._copies if not watch.is_over)
        return [*self.buckets, *self.sparse, *self.companions, *watches]

    @property
    def is_under_way(self) -> bool:
        """Return whether gradients are on the wire."""
        return any(bucket.is_sent for bucket in self.buckets)

    def note_ready(self, bucket: Bucket) -> None:
        """Send a bucket all of whose gradients are there, while backward goes on."""
        bucket.send()
        for where, place in bucket.in_common():
            self.in_common.setdefault(where, []).append((bucket, place))

    def note_change(self, parameter: nn.Parameter) -> None:
        """Note that backward has changed a gradient beside which others lie that were sent: they have not changed."""
        own = parameter.grad
        if own is not None and own.layout == torch.strided:
            for bucket, place in self.in_common.get(own.untyped_storage().data_ptr(), ()):
                bucket.mark_again(place)

    def check_untouched(self) -> None:
        """Make sure that gradients are what was sent, all of them before a mean is written: they may lie together.

        Raises:
            RuntimeError: one was changed since.
        """
        for bucket in self.buckets:
            bucket.check_untouched()
        self.in_common.clear()

    def is_of(self, trainable: Sequence[nn.Parameter]) -> bool:
        """Return whether these parameters, and no others, are laid out."""
        return are_same(trainable, self._current) or self._known() == set(trainable)

    def is_outdated(self) -> bool:
        """Return whether there is a new order, or a parameter has another type, device or shape than then."""
        return self._has_new_order or not all(bucket.fits for bucket in self.buckets)

    def build(self, trainable: Sequence[nn.Parameter]) -> None:
        """Lay the buckets out anew for what is trainable now. No gradient may be on its way."""
        self.buckets, self.bucket_of, self.sparse, self._current = [], {}, [], []
        self.question.is_carried, self._has_new_order = False, False
        self.add(trainable)

    def add(self, trainable: Sequence[nn.Parameter]) -> bool:
        """Take in parameters that have become trainable: unfrozen, or added to the optimizer. Returns whether any has.

        What is already laid out stays as it is, in buckets that may be on the wire; what is new gets buckets of its own
        behind them, on all ranks alike, and joins the others when the layout is next built.
        """
        if are_same(trainable, self._current):
            return False
        known = self._known()
        self._current = [*trainable] if known <= set(trainable) else []
        new = [parameter for parameter in trainable if parameter not in known]
        sparse = [parameter for parameter in new if parameter in self._is_sparse]
        self.sparse += [SparseRows(f"{self._prefix}.{self.name(p)}", p, self._world) for p in sparse]
        dense = self._in_order([parameter for parameter in new if parameter not in self._is_sparse])
        is_adasum = self._averaging.op == "adasum"
        # Adasum weighs each gradient by its own direction: one a tensor.
        in_parts = self._codec.gains_by_parts
        groups = [[p] for p in dense] if is_adasum else in_buckets(dense, self._averaging.bucket_bytes, in_parts)
        kind, spare = AdasumTensor if is_adasum else Bucket, self._sign_of_frozen(known.union(new))
        for group in groups:
            name, has_square = self.name(group[0]), self._averaging.has_square
            self._codec.lay_out(name, [(self.name(p), real(p.detach()).shape) for p in group])
            as_views = self._averaging.gradient_as_bucket_view and not is_adasum
            bucket = kind(self._prefix, name, group, self._codec, self._world, has_square, as_views, spare)
            bucket.neighbours = self._parameters
            if not self.buckets and not is_adasum and group[0].device.type == "cpu":
                bucket.question, self.question.is_carried = self.question, True
            self.buckets.append(bucket)
            self.bucket_of.update((parameter, bucket) for parameter in group)
        return bool(new)

    def agreed(self, parameters: Sequence[nn.Parameter]) -> list[str]:
        """Return the names of rank 0's parameters, in its order. Collective."""
        names = [self.name(parameter) for parameter in parameters] if self._world.rank == 0 else []
        return self._world.broadcast_object(names, f"{self._prefix}.order")

    def follow(self, order: Sequence[str]) -> None:
        """Have the buckets follow the order in which backward finishes parameters, by name, when they are next built.

        That is when the next gradient arrives: what the ones of before hold is free by then.
        """
        before = [parameter for bucket in self.buckets for parameter in bucket.parameters][::-1]
        self.order = list(order)
        self._has_new_order = any(a is not b for a, b in zip(self._in_order(before), before, strict=True))

    def _in_order(self, parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
        """Return parameters so that backward finishes the last one first; those not known to it stay ahead."""
        if not self.order:
            return list(parameters)
        place = {name: -i for i, name in enumerate(self.order, 1)}
        return sorted(parameters, key=lambda parameter: place.get(self.name(parameter), -len(place) - 1))

    def name(self, parameter: nn.Parameter) -> str:
        """Return the parameter's name; one that is not the model's is named by its place in the optimizer."""
        if parameter not in self._names:
            place = next(i for i, other in enumerate(self._parameters()) if other is parameter)
            self._names[parameter] = f"parameter {place}"
        return self._names[parameter]

    def _sign_of_frozen(self, trained: set[nn.Parameter]) -> int:
        """Return a number that tells which parameters are frozen, 0 if none is: ranks must not add others' gradients.

        Those that froze other layers of the same size on each rank did, and nobody was told.
        """
        frozen = [self.name(parameter) for parameter in self._parameters() if parameter not in trained]
        return 1 + crc32("\n".join(frozen).encode()) % _SIGNS if frozen else 0

    def _known(self) -> set[nn.Parameter]:
        return {*self.bucket_of, *(item.parameter for item in self.sparse)}
