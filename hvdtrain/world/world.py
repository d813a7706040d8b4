"""`World`: all that training knows of other ranks. A further back end is one file with a class derived from it."""

from __future__ import annotations

import dataclasses
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn

from hvdtrain.errors import DivergedError, HvdtrainError
from hvdtrain.process.launch import Launch
from hvdtrain.process.progress import Progress
from hvdtrain.world.averaging import Averaging, WrappedOptimizer, load_in_place, wrap_optimizer
from hvdtrain.world.carriers import ReduceOp, bits_of, for_reduction
from hvdtrain.world.exchange import GradientExchange
from hvdtrain.world.replicas import all_in_one, digest_of, first_difference

T = TypeVar("T")


class World(ABC):
    """The ranks of this run and what they do together.

    Every method marked "Collective." must be called by all ranks, in the same order, with the same `name`.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    device: torch.device
    launch: Launch
    progress: Progress
    """Where this rank is; blocking collectives note themselves."""
    num_wraps: int = 0
    """Optimizers that `wrap` was given: each one's collectives have names of their own."""
    _exchanges: Sequence[weakref.ref[GradientExchange]] = ()

    def wrap(
        self, optimizer: torch.optim.Optimizer, model: nn.Module, averaging: Averaging | None = None, **fields: Any
    ) -> WrappedOptimizer:
        """Have an optimizer average its gradients over the ranks while backward still runs. Collective.

        Args:
            optimizer: any torch optimizer over parameters of `model`. It is changed in place and returned.
            model: gives the parameters their names.
            averaging: how; None: the defaults.
            fields: those of `Averaging`, by name: `wrap(optimizer, model, accum_steps=4)`.

        Raises:
            ConfigError: Adasum needs MPI, a power of two of ranks, and uncompressed gradients; squared norms need dense
                gradients, averaged in their own type.
        """
        averaging = dataclasses.replace(averaging or Averaging(), **fields)
        self.check_averaging(averaging)
        return wrap_optimizer(self, optimizer, model, averaging)

    def claim_gradients(self, exchange: GradientExchange) -> None:
        """Have an exchange, and none that was made before it, average the parameters that it has now."""
        alive = [other for ref in self._exchanges if (other := ref()) is not None]
        for other in alive:
            other.yield_to(exchange)
        self._exchanges = [*map(weakref.ref, alive), *([] if exchange in alive else [weakref.ref(exchange)])]

    def check_averaging(self, averaging: Averaging) -> None:  # noqa: B027  most can do all of it
        """Raise ConfigError where this back end cannot average so."""

    def optimizer_type(
        self, inner: type[torch.optim.Optimizer], averaging: Averaging
    ) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
        """Return the class, derived from `inner`, that users of this back end's library expect, and its attributes."""
        return inner, {}

    def broadcast_state(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Make every rank's model and optimizer bitwise those of rank 0. Collective.

        The optimizer's state is sent as it is: a fresh optimizer takes no hidden step on any rank. Its parameter groups
        stay the objects that they are, under schedulers and whoever else holds them.

        Raises:
            UsageError: a tensor of the model cannot be sent; names it.
        """
        if self.size == 1:
            return
        if optimizer is not None:
            state = self.broadcast_object(optimizer.state_dict() if self.rank == 0 else None, "optimizer")
            if self.rank != 0:
                load_in_place(optimizer, state)
        # Tensors last, as nothing may touch them afterwards.
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self.broadcast_tensors(tensors, "model")

    def broadcast_tensors(self, tensors: Mapping[str, Tensor], name: str) -> None:
        """Overwrite every rank's tensors, of any type and layout, with rank 0's, in place. Collective.

        Raises:
            UsageError: one is sparse, quantized, or overlaps itself; names it.
        """
        all_bits = {key: bits_of(tensor, key) for key, tensor in tensors.items()}
        waits = [self.start_broadcast_(bits, f"{name}.{key}") for key, (bits, _) in all_bits.items()]
        for wait, (_, write_back) in zip(waits, all_bits.values(), strict=True):
            wait()
            write_back()

    def all_reduce(self, tensor: Tensor, op: ReduceOp, name: str) -> Tensor:
        """Return the sum, mean, minimum or maximum of `tensor` over the ranks, same shape and type. Collective.

        Raises:
            UsageError: its type has no such reduction, as integers have no mean.
        """
        return self.start_all_reduce(tensor, op, name)()

    def start_all_reduce(self, tensor: Tensor, op: ReduceOp, name: str) -> Callable[[], Tensor]:
        """Begin an `all_reduce` and return the function that waits for its result. Collective."""
        copy, restore = for_reduction(tensor, op, name)
        wait = self.start_all_reduce_(copy, op, name)
        return lambda: restore(wait())

    @abstractmethod
    def start_all_reduce_(self, tensor: Tensor, op: ReduceOp | Literal["adasum"], name: str) -> Callable[[], Tensor]:
        """Begin to reduce a contiguous tensor in place; returns the function that waits and returns it. Collective.

        Its type is one of float16, float32, float64, int32 and int64.
        adasum (arXiv:2006.02924) only where `check_averaging` lets it pass.
        """

    @abstractmethod
    def start_broadcast_(self, tensor: Tensor, name: str) -> Callable[[], Tensor]:
        """Begin to overwrite a flat tensor with rank 0's; returns the function that waits and returns it. Collective.

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

    @abstractmethod
    def all_reduce_among(self, ranks: tuple[int, ...], tensor: Tensor, name: str, op: ReduceOp = "sum") -> Tensor:
        """Return the reduction of `tensor` over some ranks. Collective among these; `init` was given the group."""

    @abstractmethod
    def broadcast_object(self, value: T | None, name: str) -> T:
        """Return rank 0's `value` on every rank; it must pickle. Other ranks may pass None. Collective."""

    @abstractmethod
    def all_gather_object(self, value: T, name: str) -> list[T]:
        """Return every rank's `value`, ordered by rank, on every rank; it must pickle. Collective."""

    def barrier(self, name: str) -> None:
        """Wait until every rank is here. Collective."""
        self.all_reduce(torch.zeros(1), "sum", f"barrier.{name}")

    def together(self, action: Callable[[], T], name: str) -> T:
        """Run `action` on every rank; where it raises HvdtrainError on any, raise the same on all. Collective.

        Any other exception is left to end its rank, and with it the job.
        """
        result, error = None, None
        try:
            result = action()
        except HvdtrainError as caught:
            error = caught
        failed = [(rank, item) for rank, item in enumerate(self.all_gather_object(error, f"together.{name}")) if item]
        if failed:
            rank, first = failed[0]
            where = "" if len(failed) == self.size else f"on rank {rank}: "
            agreed = type(first)(f"{where}{first}")
            agreed.is_on_all_ranks = True
            raise agreed from error
        return cast(T, result)

    def check_replicas(self, tensors: Mapping[str, Tensor], name: str) -> None:
        """Make sure that `tensors` are bitwise equal on all ranks. Collective.

        Raises:
            DivergedError: they are not; names the first that differs, and the ranks in the minority.
        """
        if self.size == 1:
            return
        digests = {key: digest_of(tensor) for key, tensor in tensors.items()}
        own = all_in_one(list(digests.values()))
        # The largest digest and the largest complement, which is the smallest digest's: equal if there is only one.
        largest, smallest = self.all_reduce(torch.cat((own, ~own)), "max", f"replicas.{name}").tolist()
        if largest == ~smallest:
            return
        numbers = {key: int(digest) for key, digest in digests.items()}
        difference = first_difference(self.all_gather_object(numbers, f"replicas.{name}.all"))
        if difference:
            key, ranks = difference
            who = f"rank {', '.join(map(str, ranks))}"
            raise DivergedError(f"the ranks are not equal: {key} on {who} differs from the other ranks'")

    def has_lost_contact(self, error: BaseException) -> bool:
        """Return whether an exception only says that another rank is gone."""
        return False

    def close(self) -> None:  # noqa: B027  one process has nothing to leave
        """Leave the world. Further collectives are an error."""
