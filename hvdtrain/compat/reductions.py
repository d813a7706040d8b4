"""Horovod's collectives, by its names and arguments, made of those of `World`.

Gradients go through them as through Horovod's own. What has no name is told apart by its order among the unnamed calls
of its kind: a rank that names another number of calls of another kind does not hang the job.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import Tensor

from hvdtrain.compat.place import check_process_set, global_process_set, world
from hvdtrain.errors import UsageError
from hvdtrain.world import Averaging, ReduceOp

Average, Sum, Adasum, Min, Max, Product = range(6)
_WORDS: dict[int, ReduceOp | Literal["adasum", "product"]] = {
    Average: "mean",
    Sum: "sum",
    Adasum: "adasum",
    Min: "min",
    Max: "max",
    Product: "product",
}


class Compressor:
    """A format of a tensor on the wire: derive one with these two methods."""

    @staticmethod
    def compress(tensor: Tensor) -> tuple[Tensor, Any]:
        """Return what is sent, and what `decompress` needs."""
        return tensor, None

    @staticmethod
    def decompress(tensor: Tensor, ctx: Any) -> Tensor:
        """Return the tensor in its own type."""
        return tensor


class FP16Compressor(Compressor):
    """Real numbers travel as fp16."""

    @staticmethod
    def compress(tensor: Tensor) -> tuple[Tensor, Any]:
        """Return it as fp16, and its type."""
        return (tensor.half() if tensor.is_floating_point() else tensor), tensor.dtype

    @staticmethod
    def decompress(tensor: Tensor, ctx: Any) -> Tensor:
        """Return it in its type."""
        return tensor.to(ctx)


class Compression:
    """The formats that there are."""

    none = Compressor
    fp16 = FP16Compressor


class Handle:
    """A collective that was begun; `synchronize` returns its result."""

    def __init__(self, wait: Callable[[], Any]) -> None:
        self._wait: Callable[[], Any] | None = wait
        self._result: Any = None

    def result(self) -> Any:
        """Wait for the result, and return it, however often it is asked for."""
        if self._wait is not None:
            wait, self._wait = self._wait, None
            self._result = wait()
        return self._result


def synchronize(handle: Handle) -> Any:
    """Wait for a collective that was begun by a function with `async` in its name; returns its result."""
    return handle.result()


def poll(handle: Handle) -> bool:
    """Wait for a collective, and return True: nothing is gained by asking often."""
    handle.result()
    return True


def word_of(op: int | None, average: bool | None = None) -> ReduceOp | Literal["adasum", "product"]:
    """Return the name of Horovod's `op`, or of its older `average=`; the mean where both are left out.

    Raises:
        UsageError: both are given, or there is no such operation.
    """
    if op is not None and average is not None:
        raise UsageError("give op= or average=, not both")
    if op is None:
        return "sum" if average is False else "mean"
    if op not in _WORDS:
        raise UsageError(f"op={op!r} is none of Average, Sum, Adasum, Min, Max, Product")
    return _WORDS[op]


def detached(tensor: Any) -> Tensor:
    """Return the tensor without its history.

    Raises:
        UsageError: it is no tensor.
    """
    if not isinstance(tensor, Tensor):
        raise UsageError(
            f"Horovod's collectives take tensors, not an object of type {type(tensor).__name__}: give"
            " torch.tensor(value), and .item() gives the number back"
        )
    return tensor.detach()


class _Differentiable(torch.autograd.Function):
    """A collective whose derivative is another one."""

    @staticmethod
    def forward(
        ctx: Any, tensor: Tensor, forward: Callable[[Tensor], Tensor], backward: Callable[[Tensor], Tensor] | None
    ) -> Tensor:
        ctx.derivative = backward
        return forward(tensor.detach())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        if ctx.derivative is None:
            raise UsageError("this reduction over the ranks has no derivative here: use sum or mean")
        result = ctx.derivative(gradient.contiguous())
        if torch.is_grad_enabled() and gradient.requires_grad and not result.requires_grad:
            raise UsageError(
                "this collective cannot be differentiated twice (create_graph=True): World.all_gather and"
                " World.all_reduce can, with differentiable=True"
            )
        return result, None, None


def differentiable(
    tensor: Tensor, forward: Callable[[Tensor], Tensor], backward: Callable[[Tensor], Tensor] | None
) -> Tensor:
    """Return `forward(tensor)`, whose derivative is `backward`; None: it has none, and backward says so."""
    own = detached(tensor)
    if not tensor.requires_grad or not torch.is_grad_enabled():
        return forward(own)
    return cast(Tensor, _Differentiable.apply(tensor, forward, backward))  # type: ignore[no-untyped-call]


def _start_reduction(tensor: Tensor, op: str, name: str | None) -> Callable[[], Tensor]:
    here = world()
    if op == "product":
        return lambda: here.all_gather(tensor[None], name).prod(0).to(tensor.dtype)
    if op == "adasum":
        here.check_averaging(Averaging(op="adasum"))
        copy = tensor.clone(memory_format=torch.contiguous_format)
        return here.start_all_reduce_(copy, "adasum", here.named("adasum", name))
    return here.start_all_reduce(tensor, cast(ReduceOp, op), name)


def allreduce(
    tensor: Tensor,
    average: bool | None = None,
    name: str | None = None,
    compression: type[Compressor] = Compression.none,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: Any = global_process_set,
) -> Tensor:
    """Return the reduction of a tensor over the ranks, same shape and type. Collective.

    Raises:
        UsageError: its type has no such reduction, as integers have no mean.
    """
    check_process_set(process_set)
    word = word_of(op, average)

    def reduce(value: Tensor) -> Tensor:
        sent, context = compression.compress(scaled(value, prescale_factor))
        total = _start_reduction(sent, word, name and f"allreduce.{name}")()
        return scaled(compression.decompress(total, context), postscale_factor)

    def derivative(gradient: Tensor) -> Tensor:
        return differentiable(gradient, reduce, derivative)

    return differentiable(tensor, reduce, derivative if word in ("sum", "mean") else None)


def scaled(tensor: Tensor, factor: float) -> Tensor:
    """Return the tensor times a factor, in its own type."""
    return tensor if factor == 1.0 else (tensor * factor).to(tensor.dtype)


def allreduce_async(
    tensor: Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: Any = global_process_set,
) -> Handle:
    """Begin an `allreduce`. Collective."""
    check_process_set(process_set)
    own = scaled(detached(tensor), prescale_factor)
    wait = _start_reduction(own, word_of(op, average), name and f"allreduce.{name}")
    return Handle(lambda: scaled(wait(), postscale_factor))


def allreduce_async_(
    tensor: Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: Any = global_process_set,
) -> Handle:
    """Begin an `allreduce` whose result takes the place of the tensor when it is waited for. Collective."""
    handle = allreduce_async(tensor, average, name, op, prescale_factor, postscale_factor, process_set)
    return into(tensor, handle)


def into(tensor: Tensor, handle: Handle) -> Handle:
    """Return a handle that writes the result of another into a tensor when it is waited for."""

    def write() -> Tensor:
        with torch.no_grad():
            return tensor.copy_(handle.result())

    return Handle(write)


def allreduce_(
    tensor: Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: Any = global_process_set,
) -> Tensor:
    """Replace a tensor by its reduction over the ranks. Collective."""
    handle = allreduce_async_(tensor, average, name, op, prescale_factor, postscale_factor, process_set)
    return cast(Tensor, handle.result())


def sparse_allreduce_async(tensor: Tensor, name: str, op: int, process_set: Any = global_process_set) -> Handle:
    """Begin to reduce a sparse tensor: the rows of all ranks are gathered. Collective."""
    check_process_set(process_set)
    word = word_of(op)
    if word not in ("sum", "mean"):
        raise UsageError("a sparse tensor can be reduced by Sum and Average")
    own = detached(tensor).coalesce()
    rows = world().all_gather(own.indices().t().contiguous(), f"sparse.{name}.rows")
    values = world().all_gather(own.values(), f"sparse.{name}.values")
    values = values / world().size if word == "mean" else values
    total = torch.sparse_coo_tensor(rows.t(), values, own.shape, check_invariants=False)
    return Handle(lambda: total)
