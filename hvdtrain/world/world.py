"""`World`: all that training knows of other ranks. `SoloWorld` is one process, without Horovod."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn

from hvdtrain.errors import DivergedError, HvdtrainError
from hvdtrain.process.launch import Launch
from hvdtrain.process.progress import Progress
from hvdtrain.world.replicas import all_in_one, digest_of, first_difference

T = TypeVar("T")
ReduceOp = Literal["sum", "mean", "min", "max"]
Compression = Literal["none", "fp16"]
Averaging = Literal["average", "adasum"]


class WrappedOptimizer(torch.optim.Optimizer):
    """A torch optimizer whose gradients are averaged over all ranks.

    What `World.wrap` returns has this shape: it is also an instance of the class that was wrapped (`AdamW`, ...).
    """

    @property
    def mean_square(self) -> Tensor | None:
        """Return the mean over the ranks of the squared norm of each one's own gradient, a float64 scalar.

        As of the last `synchronize`, in units of the loss that each rank has differentiated; None where it was not
        asked for, or there is one rank only.
        """
        raise NotImplementedError

    def synchronize(self) -> None:
        """Finish averaging: afterwards every rank's `.grad` holds the mean over the ranks. Collective.

        Call it before looking at gradients (clipping, unscaling); `step` does what is left, so it is optional
        otherwise. Micro-batches that a rank did not have count as zero gradients.
        """
        raise NotImplementedError


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

    @abstractmethod
    def wrap(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        *,
        accum_steps: int = 1,
        compression: Compression = "none",
        op: Averaging = "average",
        bucket_bytes: int = 25 << 20,
        has_square: bool = False,
    ) -> WrappedOptimizer:
        """Wrap an optimizer so that its gradients are averaged over the ranks while backward still runs. Collective.

        With `accum_steps` > 1, that many backward passes are *summed* before the average is taken: divide the loss by
        their number.

        Args:
            optimizer: any torch optimizer over parameters of `model`; use the returned one afterwards.
            model: gives the parameters their names.
            accum_steps: backward passes per optimizer step.
            compression: format of the gradients on the wire.
            op: "adasum" combines the ranks' gradients by their directions (arXiv:2006.02924) instead of averaging; no
                clipping may follow, as that has no meaning across ranks then.
            bucket_bytes: gradients travel in parts of this size, each as soon as backward has finished it.
            has_square: also average the squared norms of the ranks' own gradients, for the gradient noise scale.

        Raises:
            ConfigError: Adasum needs MPI, a power of two of ranks, and uncompressed gradients; squared norms need dense
                gradients, averaged in their own type.
        """

    @abstractmethod
    def broadcast_state(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Make every rank's model and optimizer bitwise those of rank 0. Collective.

        The optimizer's state is sent as it is: a fresh optimizer takes no hidden step on any rank.
        """

    @abstractmethod
    def all_reduce(self, tensor: Tensor, op: ReduceOp, name: str) -> Tensor:
        """Return the sum, mean, minimum or maximum of `tensor` over the ranks, same shape. Collective."""

    @abstractmethod
    def start_all_reduce(self, tensor: Tensor, op: ReduceOp, name: str) -> Callable[[], Tensor]:
        """Begin an `all_reduce` and return the function that waits for its result. Collective."""

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


def restore_types(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Give loaded entries back the type that they were saved in: torch's `load_state_dict` casts to the parameter's.

    NAdam's running product, for one, is fp32 beside fp64 parameters, and would go on with other last bits.
    """
    saved = state["state"]
    owned = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for place, parameter in enumerate(owned):
        for name, value in saved.get(place, {}).items():
            if isinstance(value, Tensor) and optimizer.state[parameter][name].dtype != value.dtype:
                optimizer.state[parameter][name] = value.detach().clone().to(optimizer.state[parameter][name].device)


class SoloWorld(World):
    """One process, on its own; Horovod need not be installed."""

    def __init__(self, device: torch.device, launch: Launch) -> None:
        self.device = device
        self.launch = launch
        self.progress = Progress()

    def wrap(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        *,
        accum_steps: int = 1,
        compression: Compression = "none",
        op: Averaging = "average",
        bucket_bytes: int = 25 << 20,
        has_square: bool = False,
    ) -> WrappedOptimizer:
        """Return the optimizer with a `synchronize` that has nothing to do."""
        inner = type(optimizer)
        optimizer.__class__ = type(inner.__name__, (_SoloOptimizer, inner), {})
        return cast(WrappedOptimizer, optimizer)

    def broadcast_state(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Do nothing."""

    def all_reduce(self, tensor: Tensor, op: ReduceOp, name: str) -> Tensor:
        """Return a copy."""
        return tensor.clone()

    def start_all_reduce(self, tensor: Tensor, op: ReduceOp, name: str) -> Callable[[], Tensor]:
        """Return a function that returns a copy."""
        result = tensor.clone()
        return lambda: result

    def all_reduce_among(self, ranks: tuple[int, ...], tensor: Tensor, name: str, op: ReduceOp = "sum") -> Tensor:
        """Return a copy."""
        return tensor.clone()

    def broadcast_object(self, value: T | None, name: str) -> T:
        """Return `value`."""
        return cast(T, value)

    def all_gather_object(self, value: T, name: str) -> list[T]:
        """Return `value` as the only one."""
        return [value]


class _SoloOptimizer:
    """Mixed into the class of an optimizer that needs no averaging."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the state, every tensor in the type that it was saved in."""
        super().load_state_dict(state)  # type: ignore[misc]
        restore_types(cast(Any, self), state)

    @property
    def mean_square(self) -> Tensor | None:
        """Return None: there is one gradient."""
        return None

    def synchronize(self) -> None:
        """Do nothing: there is one gradient."""

    @contextlib.contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """Do nothing; Horovod's optimizer has a context of this name."""
        yield
