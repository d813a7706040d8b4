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
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hvdtrain.world.buckets import AdasumTensor, Bucket, SparseRows, in_buckets
from hvdtrain.world.codec import Codec

if TYPE_CHECKING:
    from hvdtrain.world.averaging import Averaging
    from hvdtrain.world.world import World


class GradientExchange:
    """Averages the gradients of an optimizer's parameters over the ranks.

    A bucket leaves as soon as backward has finished all its gradients. How often backward adds to a gradient before a
    step is learned in the first step, which sends nothing early: several losses, and activation checkpoints that run
    a part of the network twice, need not be declared.

    Args:
        world: the ranks.
        parameters: returns the optimizer's parameters, in the model's order; they may change between steps.
        names: of the model's parameters.
        sparse: parameters whose gradients are sparse.
        averaging: what is averaged, and how.
        codec: what gradients become on the wire.
    """

    def __init__(
        self,
        world: World,
        parameters: Callable[[], Iterable[nn.Parameter]],
        names: dict[nn.Parameter, str],
        sparse: set[nn.Parameter],
        averaging: Averaging,
        codec: Codec,
    ) -> None:
        self.codec = codec
        self._world = world
        self._parameters = parameters
        self._names = names
        self._is_sparse = sparse
        self._averaging = averaging
        self._additions: dict[nn.Parameter, int] = {}
        """How often backward has added to each gradient in this step."""
        self._expected: dict[nn.Parameter, int] = {}
        """How often it does in a whole step."""
        self._hooks: dict[nn.Parameter, Any] = {}
        self._bucket_of: dict[nn.Parameter, Bucket] = {}
        self._buckets: list[Bucket] = []
        self._sparse: list[SparseRows] = []
        self._add_new()

    @property
    def is_under_way(self) -> bool:
        """Return whether gradients are on the wire."""
        return any(bucket.is_sent for bucket in self._buckets)

    @property
    def mean_square(self) -> Tensor | None:
        """Return the mean over the ranks of the squared norms of their own gradients, as last averaged, a scalar."""
        if not self._averaging.has_square:
            return None
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
            if not bucket.is_sent:
                bucket.send()
        for item in self._sparse:
            item.send()
        parts: list[Bucket | SparseRows] = [*self._buckets, *self._sparse]
        for part in parts:
            with self._world.progress.during("communication"):
                part.receive()
        self._learn()
        if set(self._bucket_of) | {item.parameter for item in self._sparse} != set(self._trainable()):
            self._build()

    def forget(self) -> None:
        """Start over: the gradients were cleared."""
        self._additions.clear()
        for bucket in self._buckets:
            bucket.ready = 0

    def note_addition(self, parameter: nn.Parameter) -> None:
        """Count that backward has added to a gradient; sends its bucket if that was the last of it.

        Raises:
            RuntimeError: the bucket has left before.
        """
        self._additions[parameter] = self._additions.get(parameter, 0) + 1
        expected, bucket = self._expected.get(parameter), self._bucket_of.get(parameter)
        if expected is None or bucket is None:
            return
        if self._additions[parameter] > expected and bucket.is_sent:
            raise RuntimeError(
                f"backward added to the gradient of {self._name(parameter)} {self._additions[parameter]} times before"
                f" step(), in earlier steps {expected} times, and it has been sent: give wrap() the number of backward"
                " passes as accum_steps, or add the losses up and call backward() once"
            )
        if self._additions[parameter] == expected:
            bucket.ready += 1
            if bucket.ready == len(bucket.parameters):
                bucket.send()

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
        """Take in parameters that have become trainable: unfrozen, or added to the optimizer.

        What is already laid out stays as it is, in buckets that may be on the wire; what is new gets buckets of its own
        behind them, on all ranks alike, and joins the others when the layout is next built (`_build`).
        """
        known = {*self._bucket_of, *(item.parameter for item in self._sparse)}
        new = [parameter for parameter in self._trainable() if parameter not in known]
        self._sparse += [SparseRows(f"gradients.{self._name(p)}", p, self._world) for p in new if p in self._is_sparse]
        dense = [parameter for parameter in new if parameter not in self._is_sparse]
        is_adasum = self._averaging.op == "adasum"
        # Adasum weighs each gradient by its own direction: one a tensor.
        groups = [[p] for p in dense] if is_adasum else in_buckets(dense, self._averaging.bucket_bytes)
        kind = AdasumTensor if is_adasum else Bucket
        for group in groups:
            name = f"gradients.{self._name(group[0])}"
            bucket = kind(name, group, self.codec, self._world, self._averaging.has_square)
            self._buckets.append(bucket)
            for parameter in group:
                self._bucket_of[parameter] = bucket
                self._hang(parameter)

    def _hang(self, parameter: nn.Parameter) -> None:
        this = weakref.ref(self)  # a hook must not keep the exchange alive
        hang: Any = parameter.register_post_accumulate_grad_hook
        self._hooks[parameter] = hang(lambda p: _note(this, p))

    def _name(self, parameter: nn.Parameter) -> str:
        """Return the parameter's name; one that is not the model's is named by its place in the optimizer."""
        if parameter not in self._names:
            place = next(i for i, other in enumerate(self._parameters()) if other is parameter)
            self._names[parameter] = f"parameter {place}"
        return self._names[parameter]

    def _learn(self) -> None:
        """Keep how often backward added to each gradient, where no backward pass of the step was missing.

        A count that the number of passes does not divide is of a cut-short window, or of a parameter that only some
        micro-batches use: it would make a bucket leave before its last gradient is in, so it is not believed.
        """
        for parameter, count in self._additions.items():
            if parameter not in self._expected and count % self._averaging.accum_steps == 0:
                self._expected[parameter] = count
        self._additions.clear()


def _note(exchange: weakref.ref[GradientExchange], parameter: nn.Parameter) -> None:
    alive = exchange()
    if alive is not None:
        alive.note_addition(parameter)
