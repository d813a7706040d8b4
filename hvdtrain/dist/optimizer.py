"""`hvd.DistributedOptimizer` with its traps closed (each seen in Horovod 0.28.1).

Gradients travel in buckets that are settled when the optimizer is wrapped. Left to itself, Horovod fuses whatever
happens to be ready, and the place of a number in the fused buffer decides in which order the ranks' parts of it are
added: with more than two ranks, two runs of one program then differ in the last bits. Here a bucket is one flat
tensor and Horovod's own fusion is off (`HOROVOD_FUSION_THRESHOLD=0`), so a run can be repeated bit by bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, cast

import horovod.torch as hvd
import torch
from torch import Tensor, nn

from hvdtrain.dist.world import Compression, WrappedOptimizer
from hvdtrain.progress import Progress

# As in PyTorch DDP: the first bucket is ready soon after backward has begun, the others are large enough for the ring.
FIRST_BUCKET_BYTES = 1 << 20
BUCKET_BYTES = 25 << 20

Bucket = tuple[nn.Parameter, ...]


def wrap_optimizer(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    accum_steps: int,
    compression: Compression,
    size: int,
    progress: Progress,
) -> WrappedOptimizer:
    """Wrap `optimizer` in `hvd.DistributedOptimizer`; the result averages gradients over `size` ranks."""
    inner = type(optimizer)
    names = {parameter: name for name, parameter in model.named_parameters()}
    owned = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    in_order = [parameter for parameter in names if parameter in owned]
    wrapped = hvd.DistributedOptimizer(
        optimizer,
        named_parameters=[(names[parameter], parameter) for parameter in in_order],
        backward_passes_per_step=accum_steps,
        op=hvd.Sum,
        groups=[list(bucket) for bucket in in_buckets(in_order)],
    )
    # Horovod's methods find the wrapped class by `super(self.__class__, self)`, which loops for ever in a subclass:
    # the mixin must therefore answer every method that does so, and knows the wrapped class by itself.
    wrapped.__class__ = type(inner.__name__, (_SafeMixin, type(wrapped)), {"_inner": inner})
    wrapped._size = size
    wrapped._progress = progress
    wrapped._wire_dtype = torch.float16 if compression == "fp16" else None
    return cast(WrappedOptimizer, wrapped)


def in_buckets(parameters: list[nn.Parameter]) -> list[Bucket]:
    """Split trainable parameters into buckets of one type and device, in the reverse of the model's order.

    That is about the order in which backward finishes them. The same on every rank and in every run.
    """
    buckets: list[Bucket] = []
    current: list[nn.Parameter] = []
    room = FIRST_BUCKET_BYTES
    for parameter in reversed([p for p in parameters if p.requires_grad]):
        fits = current and (parameter.dtype, parameter.device) == (current[0].dtype, current[0].device)
        if current and (not fits or room < parameter.nbytes):
            buckets.append(tuple(current))
            current, room = [], BUCKET_BYTES
        current.append(parameter)
        room -= parameter.nbytes
    return [*buckets, tuple(current)] if current else buckets


class _SafeMixin:
    """Replaces the methods of `hvd.DistributedOptimizer` that are wrong, or that break in a subclass."""

    _inner: type[torch.optim.Optimizer]
    _size: int
    _progress: Progress
    _wire_dtype: torch.dtype | None
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
        """Finish averaging; a second call before the next backward pass does nothing.

        A bucket that is not on its way yet, because a rank had fewer micro-batches or did not use a parameter, is sent
        now, with zeros for gradients that are missing. So every rank sends every bucket exactly once.
        """
        this = cast(Any, self)
        if self._synchronized and not this._handles:
            return
        for bucket in this._group_counts:
            if bucket not in this._handles:
                this._handles[bucket] = self._grouped_allreduce_grad_async(bucket)
        for bucket in this._group_counts:
            handle, wire = this._handles[bucket]
            with self._progress.during("communication"):
                hvd.synchronize(handle)
            _unpack(wire, bucket)
            for parameter in bucket:
                this._allreduce_delay[parameter] = this.backward_passes_per_step
            this._group_counts[bucket] = 0
        this._handles.clear()
        self._synchronized = True

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

    def _grouped_allreduce_grad_async(self, bucket: Bucket) -> tuple[Any, Tensor]:
        """Send a bucket; Horovod's hooks call this as soon as its last gradient is ready. Returns handle and buffer.

        Each rank divides its own part before the sum: the other way round large fp16 numbers overflow.
        """
        wire = _pack(bucket, self._wire_dtype).div_(self._size)
        name = cast(Any, self)._parameter_names[bucket[0]]
        return hvd.allreduce_async_(wire, op=hvd.Sum, name=f"gradients.{name}"), wire


def _pack(bucket: Bucket, wire_dtype: torch.dtype | None) -> Tensor:
    """Return a bucket's gradients as one flat, contiguous tensor of a type that Horovod carries.

    A gradient that is alone in its bucket and can be sent as it is, is not copied.
    """
    for parameter in bucket:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [cast(Tensor, parameter.grad) for parameter in bucket]
    own = gradients[0].dtype
    dtype = wire_dtype or (torch.float32 if own == torch.bfloat16 else own)
    if len(gradients) == 1 and dtype == own and gradients[0].is_contiguous():
        return gradients[0].view(-1)
    return torch.cat([gradient.reshape(-1).to(dtype) for gradient in gradients])


def _unpack(wire: Tensor, bucket: Bucket) -> None:
    """Make the bucket's averaged gradients its parameters' `.grad`: parts of the buffer where they fit as they are."""
    start = 0
    for parameter in bucket:
        average = wire[start : start + parameter.numel()].view(parameter.shape)
        gradient = cast(Tensor, parameter.grad)
        if gradient.is_contiguous() and gradient.dtype == wire.dtype:
            parameter.grad = average
        else:
            gradient.copy_(average)
        start += parameter.numel()
