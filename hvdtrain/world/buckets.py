"""Which gradients travel together, and how they get into and out of the buffer that is sent."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hvdtrain.models.private_tensors import holders_of
from hvdtrain.models.private_torch import copy_all_
from hvdtrain.world import gradients, huge_pages
from hvdtrain.world.codec import Codec
from hvdtrain.world.filling import fill, lies_densely, like, real, repeats
from hvdtrain.world.gradients import Mark, Memory, has_changed, mark_of
from hvdtrain.world.question import Question

if TYPE_CHECKING:
    from hvdtrain.world.world import World

# As in PyTorch DDP: the first bucket is ready soon after backward has begun.
FIRST_BUCKET_BYTES = 1 << 20
# A bucket of a smaller share of the usual size, such as the last norm's, is not worth a collective of its own.
_LEAST_SHARE = 400


def in_buckets(
    parameters: Sequence[nn.Parameter], bucket_bytes: int, in_parts: bool = True
) -> list[list[nn.Parameter]]:
    """Split parameters into buckets of one type and device, in the reverse of the order that they are given in.

    Of the model's order, that is about the one in which backward finishes them. The same on every rank.

    The first bucket is a small one, to leave soon, and the last one is cut once more, so that little is left to send
    when backward is over; where `in_parts` is False the first is one with the next, and the last whole.
    """
    buckets: list[list[nn.Parameter]] = []
    room, filled = min(FIRST_BUCKET_BYTES, bucket_bytes), 0
    for parameter in reversed(parameters):
        first = buckets[-1][0] if buckets else None
        fits = first is not None and form_of(parameter)[:2] == form_of(first)[:2]
        if not fits or (room < parameter.nbytes and filled >= bucket_bytes // _LEAST_SHARE):
            room, filled = bucket_bytes if buckets else room, 0
            buckets.append([])
        buckets[-1].append(parameter)
        room -= parameter.nbytes
        filled += parameter.nbytes
    if in_parts:
        return [*buckets[:-1], *_tapered(buckets[-1])] if buckets else []
    if len(buckets) > 1 and form_of(buckets[0][0])[:2] == form_of(buckets[1][0])[:2]:
        return [buckets[0] + buckets[1], *buckets[2:]]
    return buckets


def _tapered(bucket: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Cut a bucket so that what backward finishes last leaves in ever smaller parts.

    From the end, each is up to twice as large as the one behind it: while it travels, backward computes the rest.
    """
    if sum(parameter.nbytes for parameter in bucket) <= 4 * FIRST_BUCKET_BYTES:
        return [bucket]
    parts: list[list[nn.Parameter]] = [[]]
    room, filled = FIRST_BUCKET_BYTES, 0
    for parameter in reversed(bucket):
        if filled + parameter.nbytes > room and filled >= room // 4:
            parts.append([])
            room, filled = 2 * room, 0
        parts[-1].append(parameter)
        filled += parameter.nbytes
    return [part[::-1] for part in reversed(parts)]


def form_of(parameter: nn.Parameter) -> tuple[torch.dtype, torch.device, torch.Size]:
    """Return the type, device and shape of a parameter's gradient, whose type may be another than the parameter's."""
    return getattr(parameter, "grad_dtype", None) or parameter.dtype, parameter.device, parameter.shape


class Bucket:
    """Parameters of one type whose gradients travel as one flat tensor.

    Behind the gradients lies one number a parameter: the share of ranks that have a gradient for it. Complex gradients
    travel as pairs of real numbers. Behind these lie `spare` zeros: Horovod refuses to add what is not equally long.

    Args:
        prefix: of the collectives' names, the optimizer's own.
        name: of the bucket among those of its optimizer, alike in every run.
        parameters: of one type and device.
        codec: what the gradients become on the wire.
        world: the ranks.
        has_square: also send the squared norm of what this rank has computed.
        as_views: let gradients lie in the buffer as soon as backward has finished them (`take_in`).
        spare: numbers more than are needed.
    """

    square: Tensor
    """After `receive`, the mean over the ranks of the squared norms of their own gradients, `(1,)`; or `(0,)`."""
    _may_be_native = True

    def __init__(
        self,
        prefix: str,
        name: str,
        parameters: Sequence[nn.Parameter],
        codec: Codec,
        world: World,
        has_square: bool = False,
        as_views: bool = False,
        spare: int = 0,
    ) -> None:
        self.prefix = prefix
        self.name = name
        self.parameters = tuple(parameters)
        self.question: Question | None = None
        """Travels with the gradients, if there is one."""
        self.ready = 0
        """How many of the parameters have their whole gradient."""
        self.neighbours: Callable[[], Iterable[nn.Parameter]] | None = None
        """Returns the parameters whose gradients may lie in the memory of these; None: these alone."""
        self._codec = codec
        self._world = world
        self._waits: list[tuple[Tensor, Callable[[], Tensor]]] = []
        """What is on the wire: the part of the buffer, and the function that waits for its mean."""
        self._marks: list[Mark | None] = []
        """What the gradients were when they were sent."""
        self._forms = [form_of(parameter) for parameter in self.parameters]
        self._has_square = has_square
        self._spare = spare
        # A squared norm needs more than 8 bits.
        self._is_native = self._may_be_native and not has_square and codec.is_native(world, self._forms[0][0])
        self._allocate()
        self.takes_in = as_views and self._wire.dtype == self._forms[0][0].to_real()
        """Whether `take_in` moves gradients: on the wire they have their own type."""

    def _allocate(self) -> None:
        """Make the buffer, and views of its parts."""
        wholes = [real(parameter.detach()) for parameter in self.parameters]
        counts = [whole.numel() for whole in wholes]
        lengths = [*counts, len(counts), int(self._has_square), self._spare]
        dtype = self._forms[0][0] if self._is_native else self._codec.buffer_type(self._forms[0][0].to_real())
        self._wire = huge_pages.zeros(sum(lengths), dtype, self.parameters[0].device)
        *flat, self._users, self.square, spare = torch.split(self._wire, lengths)
        self._numbers, self._counts = torch.split(self._wire, [sum(counts), sum(lengths) - sum(counts)])
        # In the parameter's own order: torch's fused optimizers go through both as they lie in memory.
        self._views = [
            like(view, whole) if lies_densely(whole) else view.view(whole.shape)
            for view, whole in zip(flat, wholes, strict=True)
        ]
        del flat, spare
        self._holders = holders_of(self._wire)

    def _leave_to_holders(self) -> None:
        """Take a new buffer where somebody still has a gradient of an earlier step: it stays what it was.

        Also where a gradient has become another parameter's: it would be written over before it is read.
        """
        first, end = self._wire.data_ptr(), self._wire.data_ptr() + self._wire.nbytes
        pairs = zip(self.parameters, self._views, strict=True)
        there = [(own, view) for parameter, view in pairs if (own := parameter.grad) is not None and not own.is_sparse]
        inside = [(own, view) for own, view in there if first <= own.data_ptr() < end]
        are_moved = any(own.data_ptr() != view.data_ptr() for own, view in inside)
        if are_moved or holders_of(self._wire) > self._holders + len(inside):
            self._allocate()

    def _memory(self) -> Memory:
        return Memory(self.neighbours or (lambda: self.parameters))

    @property
    def num_learning(self) -> int:
        """Return how many of the parameters get a gradient."""
        return len(self.parameters)

    @property
    def is_sent(self) -> bool:
        """Return whether it is on the wire."""
        return bool(self._waits)

    @property
    def fits(self) -> bool:
        """Return whether the parameters are what they were: `model.to(...)` converts them in place."""
        return all(map(_has_form, self.parameters, self._forms))

    def take_in(self) -> bool:
        """Make parts of the buffer the parameters' `.grad`, of the same numbers: what backward has taken is free then.

        Once the bucket is sent, `.grad` holds what is on the wire, and the mean at the end of backward.

        Returns:
            Whether one is left that something else holds, as autograd does while its hooks run.
        """
        waiting = gradients.waiting(self.parameters, self._views)
        if waiting and self.is_sent:
            return gradients.let_go(self.parameters, self._views, self._marks, waiting, self._memory())
        if waiting:
            self._leave_to_holders()
            return gradients.move(self.parameters, self._views, waiting, self._memory())
        return False

    def send(self) -> None:
        """Put the gradients on the wire. Each rank divides its part first: the other way round, fp16 overflows.

        Native ones are divided after they were added, in fp32, which does not, and rounds once.
        """
        size = 1 if self._is_native else self._world.size
        self._leave_to_holders()
        own = [parameter.grad for parameter in self.parameters]
        fill(self._numbers, self._views, self._users, own, size)
        if self.question is not None:
            self.question.write(self._users, self._world.size // size)
        if len(self.square):  # divided by the ranks once instead of twice: the sum over them is the mean
            self.square.copy_(torch.dot(self._numbers, self._numbers) * size)
        if self._is_native:
            mean = self._world.start_all_reduce_(self._wire, "mean", f"{self.prefix}.{self.name}")
            self._waits = [(self._wire, mean)]
        elif self._codec.is_elementwise or self._codec.has_exact_tail:
            self._waits = [(self._wire, self._codec.start(self._world, self.prefix, self.name, self._wire))]
        else:
            counts = self._world.start_all_reduce_(self._counts, "sum", f"{self.prefix}.{self.name}.counts")
            numbers = self._codec.start(self._world, self.prefix, self.name, self._numbers)
            self._waits = [(self._counts, counts), (self._numbers, numbers)]
        self._mark()

    def _mark(self) -> None:
        self._marks = [None if p.grad is None else mark_of(p.grad) for p in self.parameters]

    def in_common(self) -> Iterator[tuple[int, int]]:
        """Yield where gradients lie that share memory, and so a count of changes, with others: and their places."""
        for place, parameter in enumerate(self.parameters):
            own = parameter.grad
            if own is not None and own.layout == torch.strided:
                memory = own.untyped_storage()
                if memory.nbytes() > own.nbytes:
                    yield memory.data_ptr(), place

    def mark_again(self, place: int) -> None:
        """Take what a gradient is now for what was sent: one that lies beside it in the same memory has changed."""
        own, mark = self.parameters[place].grad, self._marks[place] if self._marks else None
        if own is not None and mark is not None and own is mark[0]:
            self._marks[place] = mark_of(own)

    def check_untouched(self) -> None:
        """Make sure that gradients are what was sent.

        Raises:
            RuntimeError: one was changed: the change would be lost.
        """
        for parameter, mark in zip(self.parameters, self._marks, strict=True):
            gradient = parameter.grad
            if (mark is None) != (gradient is None) or (mark and gradient is not None and has_changed(gradient, mark)):
                raise RuntimeError(
                    f"a gradient was changed while it was on the wire, in or near that of {self.name}: a hook that"
                    " changes gradients must be registered before wrap(); or change them after backward()"
                )

    def receive(self) -> None:
        """Wait for the mean and make it the parameters' `.grad`: parts of the buffer where they fit as they are."""
        for part, wait in self._waits:
            mean = wait()
            if mean is not part:
                part.copy_(mean)
        if self.question is not None:
            self.question.read(self._users)
        self._codec.received(self.name, self._users)
        self._waits, self._marks, self.ready = [], [], 0
        memory = self._memory()
        kept: list[tuple[Tensor, Tensor]] = []
        """Gradients that stay where they are, and their means."""
        for i, (parameter, view) in enumerate(zip(self.parameters, self._views, strict=True)):
            is_free, dtype = memory.can_be_replaced(parameter), self._forms[i][0]
            gradient = parameter.grad
            if gradient is None and not self._users[i]:  # asked only where it is in doubt: on a GPU it waits
                continue
            mean = torch.view_as_complex(view.to(dtype.to_real())) if parameter.is_complex() else view
            if mean.dtype == dtype and is_free:
                # Another tensor over the same memory: `model.to(...)` sets the `data` of the one that it finds. It
                # counts its own changes: a codec may write into the other parts while this one is on the wire again.
                parameter.grad = mean.data
            elif gradient is None or gradient.is_sparse or repeats(gradient):
                parameter.grad = torch.empty_like(parameter, dtype=dtype).copy_(mean)
            elif gradient.data_ptr() != mean.data_ptr():
                kept.append((gradient.detach(), mean))
        if kept:  # by few kernels: a format of another type has all of them here
            copy_all_([own for own, _ in kept], [mean for _, mean in kept])


class AdasumTensor(Bucket):
    """One gradient that is combined by Adasum (arXiv:2006.02924): each rank gives its own mean, undivided."""

    _may_be_native = False  # Horovod's Adasum does not take bfloat16

    def send(self) -> None:
        """Put the gradient on the wire, zeros where there is none, and which ranks have one."""
        self._leave_to_holders()  # before anything is taken of the buffer: it may be another one afterwards
        (parameter,), (view,) = self.parameters, self._views
        self._users.fill_(parameter.grad is not None)
        if parameter.grad is None:
            view.zero_()
        else:
            gradient = parameter.grad.detach()
            view.copy_(real(gradient.to_dense() if gradient.is_sparse else gradient))
        users = self._world.start_all_reduce_(self._users, "sum", f"{self.prefix}.{self.name}.users")
        # As it lies in memory: the view of a parameter that lies in another order has gaps for Horovod.
        numbers = self._world.start_all_reduce_(self._numbers, "adasum", f"{self.prefix}.{self.name}")
        self._waits = [(self._users, users), (self._numbers, numbers)]
        self._mark()


def _has_form(parameter: nn.Parameter, form: tuple[torch.dtype, torch.device, torch.Size]) -> bool:
    return form_of(parameter) == form
