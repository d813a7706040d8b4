"""`World`: all that training knows of other ranks. A further back end is one file with a class derived from it."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from hvdtrain.errors import DivergedError, HvdtrainError, UsageError, on_all_ranks
from hvdtrain.models.elsewhere import kept_elsewhere
from hvdtrain.models.walk import owned_by
from hvdtrain.process.launch import Launch
from hvdtrain.world.alike import check_same, rows_of
from hvdtrain.world.averaging import Averaging
from hvdtrain.world.build_info import built_with
from hvdtrain.world.codec import Codec
from hvdtrain.world.collectives import Collectives
from hvdtrain.world.exchange import GradientExchange
from hvdtrain.world.loaded_state import send_state
from hvdtrain.world.replicas import (
    all_in_one,
    check_forward_pass,
    check_module,
    digest_of,
    first_difference,
    per_rank_buffers,
)
from hvdtrain.world.sampler import RankSampler
from hvdtrain.world.state_file import read_state, write_state
from hvdtrain.world.wrapped import WrappedOptimizer, wrap_optimizer

T = TypeVar("T")


class World(Collectives):
    """The ranks of this run and what they do together: see also `Collectives`."""

    local_rank: int = 0
    local_size: int = 1
    launch: Launch
    num_wraps: int = 0
    """Optimizers that `wrap` was given: each one's collectives have names of their own."""
    _exchanges: Sequence[weakref.ref[GradientExchange]] = ()

    @functools.cached_property
    def built_with(self) -> frozenset[str]:
        """What Horovod was built with: "mpi", "gloo", "nccl", "cuda" and so on; nothing where it is not installed."""
        return built_with()

    @functools.cached_property
    def reads_at_once(self) -> bool:
        """Whether reading a tensor's value waits for nothing; a GPU computes while Python goes on."""
        return self.device.type == "cpu"

    def give_way(self) -> None:
        """Have what carries messages leave the processors to this process's own work, where both want them, for good.

        For messages that nobody waits for: Open MPI looks for them without pause, and would take half of a core.
        """

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
            UsageError: something else is given than an optimizer and a module.
            ConfigError: ranks differ in what they give, or in its order; says in what.
                Adasum needs MPI, a power of two of ranks, and uncompressed gradients; squared norms need dense
                gradients, averaged in their own type; an embedding has `max_norm`, and there are several ranks.
        """
        check_module(model, "wrap(optimizer, model)")
        if averaging is not None and not isinstance(averaging, Averaging):
            raise UsageError(f"wrap() takes how to average by name, as accum_steps={averaging!r}, or an Averaging(...)")
        averaging = dataclasses.replace(averaging or Averaging(), **fields)
        self.check_averaging(averaging)
        if self.size > 1:
            check_forward_pass(model, warns=self.rank == 0)
        return wrap_optimizer(self, optimizer, model, averaging)

    def claim_gradients(self, exchange: GradientExchange) -> None:
        """Have an exchange, and none that was made before it, average the parameters that it has now.

        One that was made before and averages in another way can then be used no more: it says so.
        """
        alive = [other for ref in self._exchanges if (other := ref()) is not None]
        for other in alive:
            other.yield_to(exchange)
        self._exchanges = [*map(weakref.ref, alive), *([] if exchange in alive else [weakref.ref(exchange)])]

    def serves_another(self, codec: Codec) -> bool:
        """Tell whether a codec belongs to an optimizer that was wrapped before and is still there."""
        return any(other.codec is codec for ref in self._exchanges if (other := ref()) is not None)

    def not_averaged(self, model: nn.Module) -> list[str]:
        """Return the names of a model's parameters that have a gradient here, and no optimizer that averages it.

        One without numbers is left out: there is nothing in its gradient.
        """
        alive = [exchange for ref in self._exchanges if (exchange := ref()) is not None]
        known = {parameter for exchange in alive for parameter in exchange.of_optimizer()}
        named = model.named_parameters()
        return [name for name, p in named if p.requires_grad and p.grad is not None and p.numel() and p not in known]

    def gpu_of_gradients(self) -> int | None:
        """Return the number of the GPU on which an optimizer's gradients are averaged; None: on none."""
        alive = [exchange for ref in self._exchanges if (exchange := ref()) is not None]
        devices = {parameter.device for exchange in alive for parameter in exchange.of_optimizer()}
        return next((device.index for device in devices if device.type == "cuda"), None)

    def check_averaging(self, averaging: Averaging) -> None:
        """Raise ConfigError where this back end cannot average so."""

    def optimizer_type(
        self, inner: type[torch.optim.Optimizer], averaging: Averaging
    ) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
        """Return the class, derived from `inner`, that users of this back end's library expect, and its attributes."""
        return inner, {}

    def broadcast_state(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, root: int = 0) -> None:
        """Make every rank's model and optimizer bitwise those of rank `root`. Collective.

        The optimizer's state is sent as it is: a fresh optimizer takes no hidden step on any rank. Its parameter groups
        stay the objects that they are, under schedulers and whoever else holds them. Parameters that it has and the
        model has not, such as a temperature, are sent with it.

        Raises:
            UsageError: a tensor of the model cannot be sent; names it. There is no rank `root`, something else is given
                than a module and an optimizer, or the optimizer's state is sharded.
            ConfigError: the model's tensors have other names, shapes, types or another order on some ranks.
            DivergedError: a sparse buffer is not the same on all ranks: it is not sent.
        """
        self._check_rank(root)
        check_module(model, "broadcast_state(model, optimizer)")
        if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
            kind = type(optimizer).__name__
            raise UsageError(f"broadcast_state(model, optimizer) was given an object of type {kind} as the optimizer")
        if self.size == 1:
            return
        check_same(self, rows_of([*model.named_parameters(), *model.named_buffers()]), "broadcast_state(model)")
        if optimizer is not None:
            self.broadcast_optimizer(optimizer, root)
        # Tensors last, as nothing may touch them afterwards. What each rank has read for itself is compared, not sent;
        # sparse buffers, such as the edges of a graph, are compared, too.
        elsewhere = kept_elsewhere(model)
        weights = {name: parameter for name, parameter in model.named_parameters() if name not in elsewhere}
        buffers = dict(model.named_buffers())
        sparse = {name: buffer for name, buffer in buffers.items() if buffer.layout != torch.strided}
        tensors = {**weights, **{name: buffer for name, buffer in buffers.items() if name not in sparse}}
        if optimizer is not None:
            own = set(model.parameters())
            more = [parameter for parameter in owned_by(optimizer) if parameter not in own]
            tensors.update({f"parameter {number} of the optimizer": item for number, item in enumerate(more)})
        self.broadcast_tensors(tensors, "model", root)
        self.check_replicas(sparse, "model.sparse")

    def broadcast_optimizer(self, optimizer: torch.optim.Optimizer, root: int = 0) -> None:
        """Make every rank's optimizer state that of rank `root`; its parameters are left alone. Collective.

        Raises:
            UsageError: its state is sharded: no rank has what another one needs.
        """
        if getattr(optimizer, "sharding", None) is not None:
            raise UsageError(
                "an optimizer that was wrapped with shard=True has another part of its state on each rank, and none to"
                " broadcast: broadcast_state(model) alone, and the optimizer's before it is wrapped"
            )
        send_state(self, optimizer, root)

    def average_buffers(self, model: nn.Module) -> None:
        """Make buffers equal on all ranks: the mean of real ones, such as running statistics. Collective.

        Counts and flags become the largest over the ranks. What `keep_per_rank` was told of is left alone.

        Raises:
            DivergedError: a sparse buffer is not the same on all ranks: it has no mean here.
        """
        check_module(model, "average_buffers(model)")
        own = per_rank_buffers(model)
        buffers = {name: buffer for name, buffer in model.named_buffers() if name not in own}
        sparse = {name: buffer for name, buffer in buffers.items() if buffer.layout != torch.strided}
        self.average_tensors([buffer for name, buffer in buffers.items() if name not in sparse], "own_buffers")
        if sparse:
            self.check_replicas(sparse, "own_buffers.sparse")

    def sampler(self, num_samples: int, *, shuffle: bool = True, seed: int = 0) -> RankSampler:
        """Return this rank's part of `num_samples` samples, for a `DataLoader(dataset, sampler=...)`.

        Raises:
            UsageError: there are fewer samples than ranks, or it is no number.
        """
        return RankSampler(num_samples, self.rank, self.size, shuffle=shuffle, seed=seed)

    def save(self, state: Mapping[str, Any], path: str | Path) -> None:
        """Have rank 0 write what `torch.save` can, whole or not at all; returns when it is there. Collective.

        Raises:
            UsageError: the file cannot be written.
        """
        self.together(lambda: write_state(state, Path(path)) if self.rank == 0 else None, "save")

    def load(self, path: str | Path) -> Any:
        """Return on every rank what rank 0 reads there, tensors in host memory; runs no code. Collective.

        Raises:
            UsageError: there is no such file, or it holds other things than tensors and plain values.
        """
        state = self.together(lambda: read_state(Path(path)) if self.rank == 0 else None, "load")
        return self.broadcast_object(state, "load")

    def scatter_object(self, values: Sequence[T] | None, name: str | None = None) -> T:
        """Return on rank r the r-th of rank 0's values; they must pickle. Other ranks may pass None. Collective.

        Raises:
            UsageError: rank 0 has not given one value for each rank, or one does not pickle.
        """
        self.together(lambda: self._check_values(values), "scatter_object")
        return cast(T, self.scatter_pickled(values, self.named("scatter_object", name)))

    def _check_values(self, values: Sequence[Any] | None) -> None:
        if self.rank == 0 and (not isinstance(values, Sequence) or len(values) != self.size):
            given = f"{len(values)}" if isinstance(values, Sequence) else f"an object of type {type(values).__name__}"
            raise UsageError(f"scatter_object() takes one value for each of the {self.size} ranks, not {given}")

    def scatter_pickled(self, values: Sequence[Any] | None, name: str) -> Any:
        """Return this rank's of rank 0's values: here all are sent to all, one after the other. Collective."""
        each = (self.broadcast_pickled(values and values[rank], name, 0) for rank in range(self.size))
        return [value if rank == self.rank else None for rank, value in enumerate(each)][self.rank]

    def together(self, action: Callable[[], T], name: str) -> T:
        """Run `action` on every rank; where it raises HvdtrainError on any, raise the same on all. Collective.

        Any other exception is left to end its rank, and with it the job.
        """
        result, error = None, None
        try:
            result = action()
        except HvdtrainError as caught:
            error = caught
        if not self._any(error is not None, f"together.{name}.any"):
            return cast(T, result)
        failed = [(rank, item) for rank, item in enumerate(self.all_gather_object(error, f"together.{name}")) if item]
        rank, first = failed[0]
        where = "" if len(failed) == self.size else f"on rank {rank}: "
        agreed = type(first)(f"{where}{first}")
        agreed.is_on_all_ranks, agreed.stack = True, first.stack
        raise agreed from error

    def _any(self, own: bool, name: str) -> bool:
        """Return whether any rank says yes. Collective; in host memory, where it does not depend on GPUs."""
        if self.size == 1:
            return own
        return bool(self.start_all_reduce_(torch.tensor([float(own)], device="cpu"), "max", name)())

    def agrees(self, value: object, name: str) -> bool:
        """Return whether all ranks give values of the same `repr`; alike on all. Collective.

        Two numbers travel, however long the values are and however many the ranks: gather them only where they differ.
        """
        return self.size == 1 or self.start_agreeing(value, name)()

    def start_agreeing(self, value: object, name: str) -> Callable[[], bool]:
        """Begin `agrees` and return the function that waits for its answer. Collective."""
        own = int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:8], "big", signed=True)
        # The largest digest and the largest complement, which is the smallest digest's: equal if there is only one.
        wait = self.start_all_reduce_(torch.tensor([own, ~own], device="cpu"), "max", name)

        def answer() -> bool:
            largest, smallest = wait().tolist()
            return bool(largest == ~smallest)

        return answer

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
            raise on_all_ranks(DivergedError(f"the ranks are not equal: {key} on {who} differs from the other ranks'"))

    def has_lost_contact(self, error: BaseException) -> bool:
        """Return whether an exception only says that another rank is gone."""
        return False

    def close(self) -> None:
        """Leave the world. Further collectives are an error."""
