"""What ranks exchange: the few operations that a back end must have, and those that are made of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar, cast, overload

import torch
from torch import Tensor, nn

from hvdtrain.errors import UsageError
from hvdtrain.process.progress import Progress
from hvdtrain.world.carriers import (
    ReduceOp,
    bits_of,
    check_rank,
    check_tensor,
    for_reduction,
    number_of,
    say_where_gradients_end,
    with_bits,
)
from hvdtrain.world.differentiable import gathered, reduced
from hvdtrain.world.means import average

T = TypeVar("T")
_UNNAMED = 1024


class Collectives(ABC):
    """What all ranks do together.

    What they return has no gradient, but for `all_reduce` and `all_gather` where they are told so.

    Every method marked "Collective." must be called by all ranks, in the same order, with the same `name`. Where the
    name may be left out, the order alone says which calls belong together, as in MPI: give one where ranks come there
    by different ways through a program.
    """

    rank: int = 0
    size: int = 1
    device: torch.device
    progress: Progress
    """Where this rank is; blocking collectives note themselves."""
    adds_bfloat16: bool = False
    """Whether `start_all_reduce_` takes bfloat16: added as fp32 in the order of the ranks, divided, rounded once."""
    _handed: Counter[str] | None = None
    _unnamed: dict[str, int] | None = None
    """How many collectives of each kind were not named."""

    @property
    def handed_bytes(self) -> Counter[str]:
        """Return the bytes of tensors that this rank has handed over, by the first word of the collectives' names."""
        if self._handed is None:
            self._handed = Counter()
        return self._handed

    def hand(self, tensor: Tensor, name: str) -> None:
        """Count a tensor that is about to leave: called by what starts a collective."""
        self.handed_bytes[name.partition(".")[0]] += tensor.nbytes

    def named(self, kind: str, name: str | None) -> str:
        """Return the name, or one that counts the unnamed collectives of this kind: each rank comes to the same.

        Horovod's own counter is one for all kinds, and also counts what has a name. Names return after a while, as
        Horovod remembers a limited number of them.
        """
        if name is not None:
            if not isinstance(name, str):
                raise UsageError(f"a collective's name is a text, such as '{kind}.loss', not {name!r:.80}")
            return name
        self._unnamed = self._unnamed or {}
        number = self._unnamed[kind] = (self._unnamed.get(kind, 0) + 1) % _UNNAMED
        return f"unnamed.{kind}.{number}"

    @overload
    def all_reduce(
        self, tensor: Tensor, op: ReduceOp = ..., name: str | None = ..., *, differentiable: bool = ...
    ) -> Tensor: ...
    @overload
    def all_reduce(self, tensor: float, op: ReduceOp = ..., name: str | None = ...) -> float: ...

    def all_reduce(
        self, tensor: Tensor | float, op: ReduceOp = "mean", name: str | None = None, *, differentiable: bool = False
    ) -> Tensor | float:
        """Return the sum, mean, minimum or maximum over the ranks, of the same shape and type. Collective.

        A plain number, of Python or numpy, gives a plain number of Python, a float where the mean is asked for.

        With `differentiable=True` gradients flow through a sum or mean; `backward` is then collective, too.

        Raises:
            UsageError: it is neither, there is no such reduction, or none of its type, as integers have no mean.
        """
        if differentiable and isinstance(tensor, Tensor):
            return reduced(tensor, op, self, self.named("all_reduce", name))
        if isinstance(tensor, Tensor):
            return self.start_all_reduce(tensor, op, name)()
        # In host memory: a GPU would have to be waited for.
        number = number_of(tensor, op, name or "all_reduce", self.size)
        return cast(float, self.start_all_reduce(number, op, name)().item())

    def start_all_reduce(self, tensor: Tensor, op: ReduceOp, name: str | None = None) -> Callable[[], Tensor]:
        """Begin an `all_reduce` and return the function that waits for its result. Collective."""
        name = self.named("all_reduce", name)
        if isinstance(tensor, Tensor):
            say_where_gradients_end(tensor, "all_reduce", self.rank)
        copy, restore = for_reduction(tensor, op, name, self.adds_bfloat16)
        wait = self.start_all_reduce_(copy, op, name)
        return lambda: restore(wait())

    def broadcast(self, tensor: Tensor, name: str | None = None, root: int = 0) -> Tensor:
        """Return rank `root`'s tensor on every rank; all give one of the same shape and type. Collective."""
        name = self.named("broadcast", name)
        check_tensor(tensor, name)
        say_where_gradients_end(tensor, "broadcast", self.rank)
        copy = tensor.detach().clone(memory_format=torch.contiguous_format)
        self.broadcast_tensors({"tensor": copy}, name, root)
        return copy

    def broadcast_tensors(self, tensors: Mapping[str, Tensor], name: str, root: int = 0) -> None:
        """Overwrite every rank's tensors, of any type and layout, with rank `root`'s, in place. Collective.

        Raises:
            UsageError: one is sparse, quantized, or overlaps itself; names it. There is no rank `root`.
        """
        self._check_rank(root)
        all_bits = {key: bits_of(tensor, key) for key, tensor in tensors.items()}
        waits = [self.start_broadcast_(bits, f"{name}.{key}", root) for key, (bits, _) in all_bits.items()]
        for wait, (_, write_back) in zip(waits, all_bits.values(), strict=True):
            wait()
            write_back()

    def all_gather(self, tensor: Tensor, name: str | None = None, *, differentiable: bool = False) -> Tensor:
        """Return the ranks' tensors joined along their first dimension, rank 0's first. Collective.

        `(n, ...)` gives `(sum of n, ...)`; n may differ between ranks. With `differentiable=True` gradients flow
        through, for a loss over what all ranks have computed, each rank's own or all the same: averaged, they are those
        of one process. `backward` is then collective, too.

        Raises:
            UsageError: the tensor has no dimension, or cannot be sent.
        """
        name = self.named("all_gather", name)
        check_tensor(tensor, name)
        if not differentiable:
            say_where_gradients_end(tensor, "all_gather", self.rank)
        if tensor.dim() == 0:
            raise UsageError(f"'{name}' has no dimension to be joined along: give tensor.view(1)")
        if differentiable:
            return gathered(tensor, self, name)
        return with_bits(tensor, name, lambda bits: self.start_all_gather(bits, name)())

    def all_to_all(self, tensor: Tensor, name: str | None = None) -> Tensor:
        """Return what every rank has for this one: part r of its tensor is for rank r. Collective.

        `(size x n, ...)` gives the same shape, rank 0's part first.

        Raises:
            UsageError: the first dimension cannot be cut into as many equal parts as there are ranks.
        """
        name = self.named("all_to_all", name)
        self._check_cut(tensor, name)
        say_where_gradients_end(tensor, "all_to_all", self.rank)
        return with_bits(tensor, name, lambda bits: self.start_all_to_all(bits, name)())

    def reduce_scatter(self, tensor: Tensor, op: ReduceOp = "sum", name: str | None = None) -> Tensor:
        """Return this rank's part of the ranks' sum, mean, minimum or maximum. Collective.

        `(size x n, ...)` gives `(n, ...)`: rank r gets part r, added in the order of the ranks, so that it can be
        repeated bit by bit. One all-to-all carries it: half of what an all-reduce moves.

        Raises:
            UsageError: the first dimension cannot be cut into equal parts, or the type has no such reduction.
        """
        name = self.named("reduce_scatter", name)
        self._check_cut(tensor, name)
        say_where_gradients_end(tensor, "reduce_scatter", self.rank)
        copy, restore = for_reduction(tensor, op, name)
        parts = self.start_all_to_all(copy, name)()
        parts = parts.view(self.size, len(tensor) // self.size, *parts.shape[1:])
        if op in ("min", "max"):
            return restore(parts.amin(0) if op == "min" else parts.amax(0))
        total = added_in_order(parts)
        return restore(total / self.size if op == "mean" else total)

    def _check_cut(self, tensor: Tensor, name: str) -> None:
        check_tensor(tensor, name)
        if tensor.dim() == 0 or len(tensor) % self.size:
            raise UsageError(
                f"'{name}' is {tuple(tensor.shape)}, whose first dimension cannot be cut into {self.size} equal parts,"
                " one for each rank: pad it"
            )

    def _check_rank(self, root: int) -> None:
        check_rank(root, self.size)

    def join(self, batches: Iterable[T], name: str | None = None) -> Iterator[T | None]:
        """Go through `batches` until all ranks have come to their end. Collective.

        Yields None where this rank's own are used up and another's are not: take the step all the same, without a
        backward pass, which counts as zero.

        Example:
            for batch in world.join(loader):
                optimizer.zero_grad()
                if batch is not None:
                    loss_of(batch).backward()
                optimizer.step()
        """
        iterator = iter(batches)
        over = object()
        while True:
            batch = next(iterator, over)
            if not self.all_reduce(float(batch is not over), "max", name and f"{name}.join"):
                return
            yield None if batch is over else cast(T, batch)

    def average_tensors(self, tensors: Sequence[Tensor], name: str) -> None:
        """Overwrite real and complex tensors with their means over the ranks, others with the largest. Collective."""
        average(self, tensors, name)

    def broadcast_object(self, value: T | None, name: str | None = None, root: int = 0) -> T:
        """Return rank `root`'s `value` on every rank; it must pickle. Other ranks may pass None. Collective."""
        self._check_rank(root)
        return cast(T, self.broadcast_pickled(value, self.named("broadcast_object", name), root))

    def all_gather_object(self, value: T, name: str | None = None) -> list[T]:
        """Return every rank's `value`, ordered by rank, on every rank; it must pickle. Collective.

        Tensors in it that were on a rank's GPU are on this one's.
        """
        return self.all_gather_pickled(value, self.named("all_gather_object", name))

    def barrier(self, name: str | None = None) -> None:
        """Wait until every rank is here. Collective."""
        self.all_reduce(torch.zeros(1, device="cpu"), "sum", name and f"barrier.{name}")

    @abstractmethod
    def start_all_reduce_(self, tensor: Tensor, op: ReduceOp | Literal["adasum"], name: str) -> Callable[[], Tensor]:
        """Begin to reduce a contiguous tensor in place; returns the function that waits and returns it. Collective.

        Its type is one of float16, float32, float64, int32 and int64.
        adasum (arXiv:2006.02924) only where `check_averaging` lets it pass.
        """

    @abstractmethod
    def start_broadcast_(self, tensor: Tensor, name: str, root: int = 0) -> Callable[[], Tensor]:
        """Begin to overwrite a flat tensor with rank `root`'s; returns what waits and returns it. Collective.

        Its type is one of those of `start_all_reduce_`, uint8 and int16.
        """

    @abstractmethod
    def start_all_gather(self, tensor: Tensor, name: str) -> Callable[[], Tensor]:
        """Begin to join the ranks' tensors along their first dimension, whose length may differ. Collective.

        Returns the function that waits for the result, rank 0's part first.
        """

    @abstractmethod
    def start_all_to_all(self, tensor: Tensor, name: str) -> Callable[[], Tensor]:
        """Begin to send part r of `tensor`, cut into as many equal parts as there are ranks, to rank r. Collective.

        Returns the function that waits for what this rank is sent, in the order of the ranks; the shape of `tensor`.
        """

    def start_reduce_scatter(self, tensor: Tensor, lengths: Sequence[int], name: str) -> Callable[[], Tensor]:
        """Begin to add a flat tensor over the ranks; rank r gets its own part, of `lengths[r]` numbers. Collective.

        Returns the function that waits for `(lengths[rank],)`, added in the order of the ranks. `tensor` holds rank 0's
        part first, and is of a type of `start_all_reduce_`.
        """
        longest = max(lengths)
        if longest * self.size != len(tensor):
            parts = torch.split(tensor, list(lengths))
            tensor = torch.cat([nn.functional.pad(part, (0, longest - len(part))) for part in parts])
        wait = self.start_all_to_all(tensor, name)
        return lambda: added_in_order(wait().view(self.size, longest)[:, : lengths[self.rank]])

    @abstractmethod
    def all_reduce_among(self, ranks: tuple[int, ...], tensor: Tensor, name: str, op: ReduceOp = "sum") -> Tensor:
        """Return the reduction of `tensor` over some ranks. Collective among these; `init` was given the group."""

    @abstractmethod
    def broadcast_pickled(self, value: Any, name: str, root: int) -> Any:
        """Return rank `root`'s value on every rank. Collective."""

    @abstractmethod
    def all_gather_pickled(self, value: T, name: str) -> list[T]:
        """Return every rank's value, ordered by rank. Collective."""

    def answer_with_zeros(self, gpu: int | None = None) -> int:
        """Give zeros to whatever the others reduce until every rank has come here; returns the last one. Collective.

        Horovod's `join`, for scripts that were written for it; `join` of this class needs no help of the back end.

        Args:
            gpu: its number, where the others' tensors would lie on one here; None: they would be in host memory.
        """
        return self.rank


def added_in_order(parts: Tensor) -> Tensor:
    """Return the sum over the first dimension, its entries added one after the other."""
    total = parts[0].clone(memory_format=torch.contiguous_format)
    for part in parts[1:]:
        total += part
    return total
