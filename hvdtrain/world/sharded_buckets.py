"""Buckets whose sums go to the rank that keeps that part of the optimizer's state, and to no other (arXiv:1910.02054).

A gradient is freed as soon as it lies in the buffer that is sent, and the buffer once the sum is there. All ranks send
in the order of the buckets, so a rank may wait for an early one while backward runs, and few are on the wire at a time:
where one backward pass makes a step, no rank ever holds all of the gradient after the first (ZeRO-2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hvdtrain.world.buckets import Bucket
from hvdtrain.world.codec import Codec
from hvdtrain.world.filling import fill, like, real
from hvdtrain.world.layout import Layout, Travelling
from hvdtrain.world.pieces import Cut, Piece, numbers_in

# Buckets on the wire at a time: one is summed while others travel, and each takes memory twice, as sent and received.
IN_FLIGHT = 3

if TYPE_CHECKING:
    from hvdtrain.world.averaging import Averaging
    from hvdtrain.world.question import Question
    from hvdtrain.world.world import World


class Tail:
    """What every rank must know of all buckets: who has a gradient, the squares, the question. Travels as one tensor.

    Args:
        world: the ranks.
        name: of the collective.
        lengths: of each bucket's part.
        device: of the parameters.
        question: travels with it.
    """

    def __init__(self, world: World, name: str, lengths: Sequence[int], device: torch.device, question: Question):
        self._world = world
        self._name = name
        self._wait: Callable[[], Tensor] | None = None
        self._question = question
        self._all = torch.zeros(max(1, sum(lengths)), dtype=torch.float64, device=device)
        self.views = torch.split(self._all[: sum(lengths)], list(lengths))
        self.is_sent = False
        """Whether it is on the wire."""
        self._on_wire: list[ShardedBucket] = []

    def note_sent(self, bucket: ShardedBucket) -> None:
        """Wait for the oldest bucket where too many are on the wire."""
        self._on_wire.append(bucket)
        while len(self._on_wire) > IN_FLIGHT:
            self._on_wire.pop(0).land()

    def send(self) -> None:
        """Put it on the wire, when all buckets have left."""
        if self._question.is_carried:
            self._question.write(self._all)
        self._wait = self._world.start_all_reduce_(self._all, "sum", self._name)
        self.is_sent = True

    def arrive(self) -> None:
        """Wait for it, unless it is there."""
        if self._wait is not None:
            self._wait()
            self._wait = None
            if self._question.is_carried:
                self._question.read(self._all)

    def receive(self) -> None:
        """Wait for it."""
        self.arrive()
        self.is_sent = False
        self._on_wire = []


class ShardedBucket(Bucket):
    """Gradients that are summed on the ranks that keep their parts.

    Args:
        prefix: of the collectives' names.
        name: of the bucket.
        cut: its parameters, and where they are cut.
        pieces: this rank's.
        codec: what the gradients become on the wire.
        world: the ranks.
        tail: where it notes who has a gradient.
        shares: its part of the tail, `(parameters + 1,)`.
        has_square: note the squared norm of what this rank has computed.
    """

    def __init__(
        self,
        prefix: str,
        name: str,
        cut: Cut,
        pieces: Sequence[Piece],
        codec: Codec,
        world: World,
        tail: Tail,
        shares: Tensor,
        has_square: bool,
    ) -> None:
        super().__init__(prefix, name, cut.parameters, codec, world, has_square)
        self.cut = cut
        self.pieces = pieces
        self._tail = tail
        self._shares = shares
        self._users, self.square = shares[:-1], shares[-1:]
        self._had: list[bool] = []
        """Which parameters have had a gradient on this rank."""
        self._wait: Callable[[], Tensor] | None = None
        self._mean: Tensor | None = None
        """This rank's part of it, once it has arrived."""

    def _allocate(self) -> None:
        """Take no memory before there is something to send."""

    @property
    def num_learning(self) -> int:
        """Return how many of the parameters get a gradient: others are frozen, and keep their place."""
        return sum(parameter.requires_grad for parameter in self.parameters)

    @property
    def is_sent(self) -> bool:
        """Return whether it is on the wire, or its sum is there and not yet among the gradients."""
        return self._wait is not None or self._mean is not None

    def land(self) -> None:
        """Wait for this rank's part of the sum; the buffers are freed."""
        if self._wait is not None:
            self._mean, self._wait = self._codec.decode(self.name, self._wait()), None

    @property
    def fits(self) -> bool:
        """Return whether the parameters are what they were, where they were."""
        return super().fits and all(piece.fits for piece in self.pieces)

    def rest(self) -> None:
        """Note that nobody has a gradient."""
        self._shares.zero_()

    @torch.no_grad()
    def send(self) -> None:
        """Put the gradients on the wire, and free them."""
        dtype = self._codec.buffer_type(self._forms[0][0].to_real())
        wire = torch.zeros(sum(self.cut.lengths), dtype=dtype, device=self.parameters[0].device)
        views, offset = [], 0
        for parameter in self.parameters:
            numbers = wire[offset : offset + numbers_in(parameter)]
            whole = self.cut.is_whole
            views.append(numbers.view(real(parameter.detach()).shape) if whole else like(numbers, parameter))
            offset += len(numbers)
        gradients = [parameter.grad for parameter in self.parameters]
        fill(wire, views, self._users, gradients, self._world.size)
        self._had = [gradient is not None for gradient in gradients]
        if self._has_square:
            self.square.copy_(torch.dot(wire, wire) * self._world.size)
        for parameter in self.parameters:
            parameter.grad = None
        sent, name = self._codec.encode(self.name, wire), f"{self.prefix}.{self.name}"
        self._wait = self._world.start_reduce_scatter(sent, self.cut.lengths, name)
        self._tail.note_sent(self)

    def check_untouched(self) -> None:
        """Make sure that nothing was added since the gradients were sent.

        Raises:
            RuntimeError: backward has gone on after `send`: what it added would be lost.
        """
        if any(parameter.grad is not None for parameter in self.parameters):
            raise RuntimeError(
                f"a gradient was added while it was on the wire, in or near that of {self.name}: with --optim.shard a"
                " hook must not give a parameter a gradient after backward has"
            )

    def receive(self) -> None:
        """Wait for this rank's part of the mean, and add it to the gradients of its pieces."""
        self._tail.arrive()
        self.land()
        assert self._mean is not None
        mean, self._mean, self.ready = self._mean, None, 0
        place = {parameter: i for i, parameter in enumerate(self.parameters)}
        for piece in self.pieces:
            i = place[piece.part.parameter]
            if self._had[i] or self._users[i]:  # asked only where it is in doubt: on a GPU it waits
                piece.add(mean, self._forms[i][0])


class ShardedLayout(Layout):
    """The buckets of an optimizer whose state is sharded: laid out once, whatever is frozen meanwhile.

    Args:
        world: the ranks.
        prefix: of the names of its collectives.
        names: of the model's parameters.
        averaging: how they are averaged.
        codec: what gradients become on the wire.
        cuts: the buckets.
        pieces: this rank's of each.
    """

    def __init__(
        self,
        world: World,
        prefix: str,
        names: dict[nn.Parameter, str],
        averaging: Averaging,
        codec: Codec,
        cuts: Sequence[Cut],
        pieces: Sequence[Sequence[Piece]],
    ) -> None:
        parameters = [parameter for cut in cuts for parameter in cut.parameters]
        super().__init__(world, prefix, lambda: parameters, names, set(), averaging, codec)
        lengths = [len(cut.parameters) + 1 for cut in cuts]
        device = parameters[0].device
        self.question.is_carried = device.type == "cpu"
        self._tail = Tail(world, f"{prefix}.tail", lengths, device, self.question)
        self._active: list[ShardedBucket] = []
        for cut, own, shares in zip(cuts, pieces, self._tail.views, strict=True):
            name = self.name(cut.parameters[0])
            square = averaging.has_square
            bucket = ShardedBucket(prefix, name, cut, own, codec, world, self._tail, shares, square)
            self.buckets.append(bucket)
            self.bucket_of.update((parameter, bucket) for parameter in cut.parameters)

    @property
    def parts(self) -> Sequence[Travelling]:
        """Return what leaves: the buckets in which something learns, the tail behind them, and what goes along."""
        return [*self._active, self._tail, *self.companions]

    def taking_part(self) -> set[int]:
        """Return the places of buckets that were sent with the last gradients, or would be now; alike on all ranks."""
        active = set(self._active)
        return {place for place, bucket in enumerate(self.buckets) if bucket in active}

    def note_ready(self, bucket: Bucket) -> None:
        """Send what is ready and next in turn: the same order on all ranks, whose backward passes may differ."""
        for next_one in self.buckets:
            # Asked anew: what was unfrozen since the last step must have its turn, too.
            if next_one.num_learning and not next_one.is_sent:
                if next_one.ready < next_one.num_learning:
                    return
                next_one.send()

    def is_of(self, trainable: Sequence[nn.Parameter]) -> bool:
        """Return True: those that are frozen keep their place."""
        return True

    def build(self, trainable: Iterable[nn.Parameter]) -> None:
        """Refuse: state would have to move between the ranks.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            "a parameter was converted, moved or given to another optimizer after its optimizer's state was sharded:"
            " do so before, or leave out --optim.shard"
        )

    def add(self, trainable: Sequence[nn.Parameter]) -> bool:
        """Note in which buckets something learns; what is laid out stays as it is."""
        self._active = []
        for bucket in self.buckets:
            assert isinstance(bucket, ShardedBucket)
            for piece in bucket.pieces:
                piece.drop_used()
            if bucket.num_learning or any(parameter.grad is not None for parameter in bucket.parameters):
                self._active.append(bucket)
            else:
                bucket.rest()
        return False
