"""The gradients on their way: buckets of a fixed layout, sent while backward still runs.

Left to itself, Horovod fuses whatever happens to be ready, and the place of a number in the fused buffer decides in
which order the ranks' parts of it are added: with more than two ranks, two runs of one program then differ in the last
bits. Here a bucket is one flat tensor and Horovod's own fusion is off (`HOROVOD_FUSION_THRESHOLD=0`), so a run can be
repeated bit by bit.

At the end of each bucket lies one number per parameter: the share of ranks that have a gradient for it. A parameter
that no rank used keeps `grad = None`, as it would on one process, and is neither decayed nor moved.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import horovod.torch as hvd
import torch
from torch import Tensor, nn

from hvdtrain.process.progress import Progress
from hvdtrain.world.buckets import in_buckets


class Bucket:
    """Parameters of one type whose gradients travel as one flat tensor.

    Args:
        name: of the collective.
        parameters: of one type and device.
        wire_dtype: what the gradients travel as.
        size: number of ranks.
        has_square: also send the squared norm of what this rank has computed.
    """

    square: Tensor
    """After `receive`, the mean over the ranks of the squared norms of their own gradients, `(1,)`; or `(0,)`."""

    def __init__(
        self,
        name: str,
        parameters: Sequence[nn.Parameter],
        wire_dtype: torch.dtype,
        size: int,
        has_square: bool = False,
    ) -> None:
        self.name = name
        self.parameters = tuple(parameters)
        self.ready = 0
        """How many of the parameters have their whole gradient."""
        self.handle: Any = None
        self._size = size
        counts = [parameter.numel() for parameter in self.parameters]
        lengths = [*counts, len(counts), int(has_square)]
        self._wire = torch.zeros(sum(lengths), dtype=wire_dtype, device=self.parameters[0].device)
        *flat, self._users, self.square = torch.split(self._wire, lengths)
        self._numbers = self._wire[: sum(counts)]
        self._views = [view.view(p.shape) for view, p in zip(flat, self.parameters, strict=True)]

    def send(self, op: Any) -> None:
        """Put the gradients on the wire. Each rank divides its part first: the other way round, fp16 overflows."""
        self._users.fill_(1 / self._size)
        for i, (parameter, view) in enumerate(zip(self.parameters, self._views, strict=True)):
            gradient = parameter.grad
            if gradient is None:
                view.zero_()
                self._users[i] = 0
            elif gradient.is_sparse:
                view.copy_(gradient.to_dense()).div_(self._size)
            elif gradient.dtype == torch.bfloat16:  # divided as fp32
                view.copy_(gradient).div_(self._size)
            else:
                torch.div(gradient, self._size, out=view)
        if len(self.square):  # divided by the ranks once instead of twice: the sum over them is the mean
            self.square.copy_(torch.dot(self._numbers, self._numbers) * self._size)
        self.handle = hvd.allreduce_async_(self._wire, op=op, name=self.name)

    def receive(self) -> None:
        """Wait for the mean and make it the parameters' `.grad`: parts of the buffer where they fit as they are."""
        hvd.synchronize(self.handle)
        self.handle, self.ready = None, 0
        for i, (parameter, view) in enumerate(zip(self.parameters, self._views, strict=True)):
            gradient = parameter.grad
            if gradient is None and not self._users[i]:  # asked only where it is in doubt: on a GPU it waits
                continue
            if view.dtype == parameter.dtype and (gradient is None or gradient.is_contiguous()):
                parameter.grad = view
            elif gradient is None or gradient.is_sparse:
                parameter.grad = torch.empty_like(parameter).copy_(view)
            else:
                gradient.copy_(view)


@dataclass
class _Sparse:
    """A parameter whose gradient names its non-zero rows, and what is under way for it."""

    name: str
    parameter: nn.Parameter
    handles: tuple[Any, Any] | None = None


class GradientExchange:
    """Averages the gradients of an optimizer's parameters over the ranks.

    A bucket leaves as soon as backward has finished all its gradients. How often backward adds to a gradient before a
    step is learned in the first step, which sends nothing early: several losses, and activation checkpoints that run
    a part of the network twice, need not be declared.

    Args:
        parameters: returns the optimizer's parameters, in the model's order; they may change between steps.
        names: of the model's parameters.
        sparse: parameters whose gradients are sparse.
        accum_steps: backward passes in a step.
        wire_dtype: what gradients travel as; None: as they are, bfloat16 as fp32.
        bucket_bytes: size of a bucket, the first apart.
        op: Horovod's sum, or Adasum, which takes each gradient apart.
        size: number of ranks.
        progress: notes the waiting.
        has_square: also average the squared norms of the ranks' own gradients.
    """

    def __init__(
        self,
        parameters: Callable[[], Iterable[nn.Parameter]],
        names: dict[nn.Parameter, str],
        sparse: set[nn.Parameter],
        accum_steps: int,
        wire_dtype: torch.dtype | None,
        op: Any,
        bucket_bytes: int,
        size: int,
        progress: Progress,
        has_square: bool = False,
    ) -> None:
        self.has_square = has_square
        self._parameters = parameters
        self._names = names
        self._is_sparse = sparse
        self._accum_steps = accum_steps
        self._wire_dtype = wire_dtype
        self._op = op
        self._bucket_bytes = bucket_bytes
        self._size = size
        self._progress = progress
        self._additions: dict[nn.Parameter, int] = {}
        self._expected: dict[nn.Parameter, int] = {}
        self._hooks: dict[nn.Parameter, Any] = {}
        self._bucket_of: dict[nn.Parameter, Bucket] = {}
        self._buckets: list[Bucket] = []
        self._sparse: list[_Sparse] = []
        self._build()

    @property
    def is_under_way(self) -> bool:
        """Return whether gradients are on the wire."""
        return any(bucket.handle is not None for bucket in self._buckets)

    @property
    def mean_square(self) -> Tensor:
        """Return the mean over the ranks of the squared norms of their own gradients, as last averaged, a scalar."""
        return torch.cat([bucket.square for bucket in self._buckets]).double().sum()

    @property
    def has_news(self) -> bool:
        """Return whether backward has added to a gradient since the last average."""
        return bool(self._additions)

    def finish(self) -> None:
        """Send what has not left, and wait for all: `.grad` then holds the mean, None where no rank has one.

        Every rank sends every bucket exactly once, with zeros for what it has not computed. Collective.
        """
        self._add_new()
        for bucket in self._buckets:
            if bucket.handle is None:
                bucket.send(self._op)
        for item in self._sparse:
            self._send_sparse(item)
        for bucket in self._buckets:
            with self._progress.during("communication"):
                bucket.receive()
        for item in self._sparse:
            self._receive_sparse(item)
        self._learn()
        if set(self._bucket_of) | {item.parameter for item in self._sparse} != set(self._trainable()):
            self._build()

    def _trainable(self) -> list[nn.Parameter]:
        return [parameter for parameter in self._parameters() if parameter.requires_grad]

    def _build(self) -> None:
        """Lay the buckets out anew for what is trainable now. No gradient may be on its way."""
        self._buckets, self._bucket_of, self._sparse = [], {}, []
        for hook in self._hooks.values():
            hook.remove()
        self._hooks = {}
        self._add_new()

    def _add_new(self) -> None:
        """Take in parameters that have become trainable: unfrozen, or added to the optimizer."""
        known = {*self._bucket_of, *(item.parameter for item in self._sparse)}
        new = [parameter for parameter in self._trainable() if parameter not in known]
        self._sparse += [_Sparse(f"gradients.{self._name(p)}", p) for p in new if p in self._is_sparse]
        dense = [parameter for parameter in new if parameter not in self._is_sparse]
        # Adasum weighs each gradient by its own direction: one a tensor.
        groups = (
            [[parameter] for parameter in dense] if self._op == hvd.Adasum else in_buckets(dense, self._bucket_bytes)
        )
        this = weakref.ref(self)
        for group in groups:
            own = group[0].dtype
            dtype = self._wire_dtype or (torch.float32 if own == torch.bfloat16 else own)
            kind = AdasumTensor if self._op == hvd.Adasum else Bucket
            bucket = kind(f"gradients.{self._name(group[0])}", group, dtype, self._size, self.has_square)
            self._buckets.append(bucket)
            for parameter in group:
                self._bucket_of[parameter] = bucket
                hang: Any = parameter.register_post_accumulate_grad_hook
                self._hooks[parameter] = hang(lambda p: _note(this, p))

    def _name(self, parameter: nn.Parameter) -> str:
        """Return the parameter's name; one that is not the model's is named by its place in the optimizer."""
        if parameter not in self._names:
            place = next(i for i, other in enumerate(self._parameters()) if other is parameter)
            self._names[parameter] = f"parameter {place}"
        return self._names[parameter]

    def forget(self) -> None:
        """Hear that the gradients were cleared."""
        self._additions.clear()
        for bucket in self._buckets:
            bucket.ready = 0

    def note_addition(self, parameter: nn.Parameter) -> None:
        """Hear that backward has added to a gradient; sends its bucket if that was the last of it.

        Raises:
            RuntimeError: the bucket has left before.
        """
        self._additions[parameter] = self._additions.get(parameter, 0) + 1
        expected, bucket = self._expected.get(parameter), self._bucket_of.get(parameter)
        if expected is None or bucket is None:
            return
        if self._additions[parameter] > expected and bucket.handle is not None:
            raise RuntimeError(
                f"backward added to the gradient of {self._name(parameter)} {self._additions[parameter]} times before"
                f" step(), in earlier steps {expected} times, and it has been sent: give wrap() the number of backward"
                " passes as accum_steps, or add the losses up and call backward() once"
            )
        if self._additions[parameter] == expected:
            bucket.ready += 1
            if bucket.ready == len(bucket.parameters):
                bucket.send(self._op)

    def _learn(self) -> None:
        """Keep how often backward added to each gradient, where no backward pass of the step was missing."""
        for parameter, count in self._additions.items():
            if parameter not in self._expected and count % self._accum_steps == 0:
                self._expected[parameter] = count
        self._additions.clear()

    def _send_sparse(self, item: _Sparse) -> None:
        """Send the non-zero rows: every rank gets all of them."""
        gradient = item.parameter.grad
        if gradient is None:
            rows = torch.zeros(0, dtype=torch.int64, device=item.parameter.device)
            values = torch.zeros(0, *item.parameter.shape[1:], dtype=item.parameter.dtype, device=rows.device)
        else:
            gradient = gradient.coalesce() if gradient.is_sparse else gradient.to_sparse(1)
            rows, values = gradient.indices()[0].contiguous(), gradient.values()
        wire = values.float() if values.dtype == torch.bfloat16 else values
        item.handles = (
            hvd.allgather_async(rows, name=f"{item.name}.rows"),
            hvd.allgather_async(wire.contiguous() / self._size, name=f"{item.name}.values"),
        )

    def _receive_sparse(self, item: _Sparse) -> None:
        assert item.handles is not None
        with self._progress.during("communication"):
            rows, values = (cast(Tensor, hvd.synchronize(handle)) for handle in item.handles)
        item.handles = None
        parameter = item.parameter
        if len(rows) == 0:
            parameter.grad = None
            return
        gradient = torch.sparse_coo_tensor(
            rows[None], values.to(parameter.dtype), parameter.shape, check_invariants=False
        )
        parameter.grad = gradient.coalesce()


class AdasumTensor(Bucket):
    """One gradient that is combined by Adasum (arXiv:2006.02924): each rank gives its own mean, undivided."""

    def send(self, op: Any) -> None:
        """Put the gradient on the wire, zeros where there is none."""
        (parameter,) = self.parameters
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        self._views[0].copy_(parameter.grad)
        self.handle = hvd.allreduce_async_(self._views[0], op=op, name=self.name)


def _note(exchange: weakref.ref[GradientExchange], parameter: nn.Parameter) -> None:
    """Tell an exchange that still lives; a hook must not keep it alive."""
    alive = exchange()
    if alive is not None:
        alive.note_addition(parameter)
