"""`hvd.DistributedOptimizer` with its traps closed (each seen in Horovod 0.28.1)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, cast

import horovod.torch as hvd
import torch
from torch import Tensor, nn

from hvdtrain.dist.world import Compression, WrappedOptimizer


def wrap_optimizer(
    optimizer: torch.optim.Optimizer, model: nn.Module, accum_steps: int, compression: Compression, size: int
) -> WrappedOptimizer:
    """Wrap `optimizer` in `hvd.DistributedOptimizer`; the result averages gradients over `size` ranks."""
    inner = type(optimizer)
    named = {parameter: name for name, parameter in model.named_parameters()}
    wrapped = hvd.DistributedOptimizer(
        optimizer,
        named_parameters=[(named[p], p) for group in optimizer.param_groups for p in group["params"]],
        compression=WireFormat(size, torch.float16 if compression == "fp16" else None),
        backward_passes_per_step=accum_steps,
        op=hvd.Sum,
    )
    # Horovod's methods find the wrapped class by `super(self.__class__, self)`, which loops for ever in a subclass:
    # the mixin must therefore answer every method that does so, and knows the wrapped class by itself.
    wrapped.__class__ = type(inner.__name__, (_SafeMixin, type(wrapped)), {"_inner": inner})
    return cast(WrappedOptimizer, wrapped)


class WireFormat:
    """How a gradient travels. A `Compressor` in Horovod's sense; it also divides by the number of ranks.

    Horovod sums first and divides afterwards, so that an average of large fp16 numbers overflows; here each rank
    divides its own part and the wire carries the sum. Whatever Horovod refuses is made to fit: memory that is not
    contiguous is copied, bfloat16 travels as fp32.
    """

    def __init__(self, size: int, dtype: torch.dtype | None) -> None:
        self.size = size
        self.dtype = dtype

    def compress(self, gradient: Tensor) -> tuple[Tensor, torch.dtype]:
        """Return what is sent, and the gradient's own type."""
        wire = self.dtype or (torch.float32 if gradient.dtype == torch.bfloat16 else gradient.dtype)
        if wire == gradient.dtype and gradient.is_contiguous():
            return gradient.div_(self.size), gradient.dtype
        return (gradient / self.size).to(wire).contiguous(), gradient.dtype

    def decompress(self, summed: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the averaged gradient in its own type."""
        return summed.to(dtype)


class _SafeMixin:
    """Replaces the methods of `hvd.DistributedOptimizer` that are wrong, or that break in a subclass."""

    _inner: type[torch.optim.Optimizer]
    _synchronized: bool
    _should_synchronize: bool

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients; Horovod's own knows no `set_to_none`.

        Raises:
            RuntimeError: gradients are on the wire; clearing them now would lose them.
        """
        this = cast(Any, self)
        if this._handles:
            raise RuntimeError("zero_grad() between backward and step() loses gradients: call step() first")
        self._synchronized = False
        self._inner.zero_grad(this, set_to_none)

    def synchronize(self) -> None:
        """Finish averaging; a second call before the next backward pass does nothing."""
        this = cast(Any, self)
        if self._synchronized and not this._handles:
            return
        super().synchronize()  # type: ignore[misc]

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Average what is not averaged yet, then update as the wrapped optimizer does."""
        if self._should_synchronize:
            self.synchronize()
        self._synchronized = False
        return self._inner.step(cast(Any, self), closure)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the wrapped optimizer's state."""
        self._inner.load_state_dict(cast(Any, self), state)

    @contextlib.contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """Update without averaging first: for `synchronize()`, clip, `with skip_synchronize(): step()`."""
        self._should_synchronize = False
        try:
            yield
        finally:
            self._should_synchronize = True
