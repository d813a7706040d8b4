"""`hvd.DistributedOptimizer` with its traps closed (each seen in Horovod 0.28.1)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, cast

import horovod.torch as hvd
import torch
from torch import Tensor, nn

from hvdtrain.errors import ConfigError
from hvdtrain.process.progress import Progress
from hvdtrain.world.exchange import GradientExchange
from hvdtrain.world.world import Averaging, Compression, WrappedOptimizer, restore_types


def wrap_optimizer(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    accum_steps: int,
    compression: Compression,
    op: Averaging,
    bucket_bytes: int,
    size: int,
    progress: Progress,
    has_square: bool = False,
) -> WrappedOptimizer:
    """Wrap `optimizer` in `hvd.DistributedOptimizer`; the result averages gradients over `size` ranks.

    Raises:
        ConfigError: Adasum, or the squared norms, cannot be had here.
    """
    if has_square and (op == "adasum" or compression != "none" or _sparse_parameters(model)):
        raise ConfigError(
            "--health.noise-scale needs averaged, dense gradients in their own type: leave out --comm.op,"
            " --comm.compression and sparse embeddings"
        )
    if op == "adasum":
        _check_adasum(size, compression)
    inner = type(optimizer)
    names = {parameter: name for name, parameter in model.named_parameters()}
    owned = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    wrapped = hvd.DistributedOptimizer(
        optimizer,
        named_parameters=[(names.get(p, f"parameter {i}"), p) for i, p in enumerate(owned)],
        backward_passes_per_step=accum_steps,
        op=hvd.Sum,
    )
    # Horovod builds the wrapped class anew from its parameters alone: defaults and state would be lost.
    wrapped.__dict__.update(optimizer.__dict__)
    # Horovod hangs its hooks on the graph's gradient accumulators, which live as long as this list: ours replace them.
    wrapped._grad_accs.clear()
    # Horovod's methods find the wrapped class by `super(self.__class__, self)`, which loops for ever in a subclass:
    # the mixin must therefore answer every method that does so, and knows the wrapped class by itself.
    wrapped.__class__ = type(inner.__name__, (_SafeMixin, type(wrapped)), {"_inner": inner})
    order = {parameter: place for place, parameter in enumerate(names)}

    def parameters() -> list[nn.Parameter]:
        own = [parameter for group in wrapped.param_groups for parameter in group["params"]]
        return sorted(own, key=lambda parameter: order.get(parameter, len(order)))

    wrapped._exchange = (
        GradientExchange(
            parameters,
            names,
            _sparse_parameters(model),
            accum_steps,
            torch.float16 if compression == "fp16" else None,
            hvd.Adasum if op == "adasum" else hvd.Sum,
            bucket_bytes,
            size,
            progress,
            has_square,
        )
        if size > 1
        else None
    )
    return cast(WrappedOptimizer, wrapped)


def _sparse_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Return the weights of embeddings that were built with `sparse=True`."""
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag)]
    return {cast(nn.Parameter, module.weight) for module in embeddings if module.sparse}


def _check_adasum(size: int, compression: Compression) -> None:
    if not hvd.mpi_built() or not hvd.mpi_enabled():
        raise ConfigError(
            "--comm.op adasum needs MPI: Horovod's Gloo cannot do it. Start with mpirun or horovodrun --mpi, or use"
            " --comm.op average"
        )
    if size & (size - 1):
        raise ConfigError(
            f"--comm.op adasum needs 2, 4, 8, ... ranks, not {size}: start as many, or use --comm.op average"
        )
    if compression != "none":
        raise ConfigError("--comm.op adasum works on full gradients: leave out --comm.compression")


class _SafeMixin:
    """Replaces the methods of `hvd.DistributedOptimizer` that are wrong, or that break in a subclass."""

    _inner: type[torch.optim.Optimizer]
    _exchange: GradientExchange | None
    _synchronized: bool
    _should_synchronize: bool

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients; Horovod's own knows no `set_to_none`.

        Raises:
            RuntimeError: gradients are on the wire; clearing them now would lose them.
        """
        if self._exchange is not None:
            if self._exchange.is_under_way:
                raise RuntimeError("zero_grad() between backward and step() loses gradients: call step() first")
            self._exchange.forget()
        self._synchronized = False
        self._inner.zero_grad(cast(Any, self), set_to_none)

    @property
    def mean_square(self) -> Tensor | None:
        """Return the mean over the ranks of the squared norms of their own gradients."""
        return None if self._exchange is None or not self._exchange.has_square else self._exchange.mean_square

    def synchronize(self) -> None:
        """Finish averaging; a second call before the next backward pass does nothing."""
        if self._exchange is None or (self._synchronized and not self._exchange.has_news):
            return
        self._exchange.finish()
        self._synchronized = True

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Average what is not averaged yet, then update as the wrapped optimizer does."""
        if self._should_synchronize:
            self.synchronize()
        self._synchronized = False
        return self._inner.step(cast(Any, self), closure)

    def add_param_group(self, group: dict[str, Any]) -> None:
        """Add a group; its gradients are averaged from the next step on."""
        self._inner.add_param_group(cast(Any, self), group)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the wrapped optimizer's state, every tensor in the type that it was saved in."""
        self._inner.load_state_dict(cast(Any, self), state)
        restore_types(cast(Any, self), state)

    @contextlib.contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """Let `step()` within not average first: it comes after `synchronize()` and clipping."""
        self._should_synchronize = False
        try:
            yield
        finally:
            self._should_synchronize = True
