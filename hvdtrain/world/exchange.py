"""The gradients on their way: buckets of a fixed layout, sent while backward still runs.

Left to itself, Horovod fuses whatever happens to be ready, and the place of a number in the fused buffer decides in
which order the ranks' parts of it are added: with more than two ranks, two runs of one program then differ in the last
bits. Here a bucket is one flat tensor and Horovod's own fusion is off (`HOROVOD_FUSION_THRESHOLD=0`), so a run can be
repeated bit by bit.

A *window* is `accum_steps` backward passes. At the end of the last of them, still inside `backward()`, all gradients
are averaged: what follows in a loop, be it clipping, unscaling or noise, sees the mean as it would on one process. A
rank that had fewer passes averages in `synchronize`, at the latest before its step; so do all where the model is small
and the caller waits for it (`Averaging.waits_for_caller`). A window more in the same step averages again what `.grad`
holds then: its equal part stays what it is, and the new part is averaged.

At the end of each bucket lies one number per parameter: the share of ranks that have a gradient for it. A parameter
that no rank used keeps `grad = None`, as it would on one process, and is neither decayed nor moved.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hvdtrain.models.private_torch import backward_run
from hvdtrain.world.arrivals import Arrivals
from hvdtrain.world.codec import Codec
from hvdtrain.world.gradients import Mark, has_changed, mark_of
from hvdtrain.world.layout import Layout
from hvdtrain.world.passes import EndOfBackward, Watched

if TYPE_CHECKING:
    from hvdtrain.world.averaging import Averaging
    from hvdtrain.world.world import World


class GradientExchange:
    """Averages the gradients of an optimizer's parameters over the ranks.

    A bucket leaves in the last backward pass of a window, as soon as that pass has finished all its gradients. How
    often a pass adds to a gradient is learned in the first one, which sends nothing before its end: activation
    checkpoints that run a part of the network twice need not be declared.

    Args:
        world: the ranks.
        prefix: of the names of its collectives, which no other exchange has.
        parameters: returns the optimizer's parameters, in the model's order; they may change between steps.
        names: of the model's parameters.
        sparse: parameters whose gradients are sparse.
        averaging: what is averaged, and how.
        codec: what gradients become on the wire.
        layout: the buckets; None: as the averaging has them, for what is trainable.
    """

    def __init__(
        self,
        world: World,
        prefix: str,
        parameters: Callable[[], Sequence[nn.Parameter]],
        names: dict[nn.Parameter, str],
        sparse: set[nn.Parameter],
        averaging: Averaging,
        codec: Codec,
        layout: Layout | None = None,
    ) -> None:
        self.codec = codec
        self._world = world
        self.of_optimizer = parameters
        self._yielded: set[nn.Parameter] = set()
        """Parameters of the optimizer that one wrapped later has, too: that one averages them."""
        self._later: list[GradientExchange] = []
        """The exchanges that have them: kept, so that all ranks lose them at the same time."""
        self._averaging = averaging
        this = weakref.ref(self)
        self._end_of_backward = EndOfBackward(
            lambda: alive.end_pass() if (alive := this()) is not None else None, speaks=world.rank == 0
        )
        self._passes = 0
        """Backward passes of the window that are over."""
        self._additions: dict[nn.Parameter, int] = {}
        """How often this backward pass has added to each gradient."""
        self._expected: dict[nn.Parameter, int] = {}
        """How often a whole pass does."""
        self._marks: dict[nn.Parameter, Mark] = {}
        """What each gradient was after the passes of a window that is not over."""
        self._is_averaged = False
        """Gradients were averaged since the last step."""
        self.mean_square: Tensor | None = None
        """The mean over the ranks of the squared norms of their own gradients, as last averaged, a scalar."""
        self._hooks = Watched(this)
        self.layout = layout or Layout(world, prefix, parameters, names, sparse, averaging, codec)
        self.watch_parameters()
        self.layout.add(self._trainable())
        self._arrivals = Arrivals.of(averaging, self._parameters()) if self._hooks else None

    @property
    def is_under_way(self) -> bool:
        """Return whether gradients of the optimizer are on the wire."""
        return any(exchange.layout.is_under_way for exchange in self._all())

    @property
    def is_waiting(self) -> bool:
        """Return whether gradients are averaged when the caller asks for it alone, and have not been."""
        return not self._hooks and not self._is_averaged

    @property
    def order(self) -> list[str]:
        """Return the names of parameters in the order in which backward finishes them, once it is agreed on."""
        return self.layout.order

    @order.setter
    def order(self, names: list[str]) -> None:
        if self._arrivals is not None and self._arrivals.finished is not None and names:
            self.layout.follow(names)
            self._arrivals = self._arrivals.without_order()

    def look_again(self) -> None:
        """Have `finish` average once more where nobody notes whether backward has gone on: a step may be left out."""
        for exchange in self._all():
            exchange._is_averaged &= bool(exchange._hooks)

    def finish(self) -> None:
        """Average what is not averaged yet, on a rank that has had fewer backward passes than others. Collective.

        Does nothing where all has been averaged at the end of backward.

        Raises:
            RuntimeError: a gradient was changed while it was still this rank's own.
            ConfigError: parameters are averaged by an exchange that was made later, in another way.
        """
        self._check_shared()
        unfinished = [exchange for exchange in self._all() if not exchange._is_finished]
        for exchange in unfinished:
            exchange._check_own()
            if exchange._hooks:
                exchange._hooks.say_late(exchange.watch_parameters(), self.layout, self._world.rank)
        for exchange in unfinished:
            exchange._follow_conversions()
            exchange._send()
        for exchange in unfinished:
            exchange._receive()

    def check_finished(self) -> None:
        """Raise RuntimeError where backward has computed gradients that are this rank's own still."""
        if any(exchange._passes or exchange._additions or exchange.is_waiting for exchange in self._all()):
            raise RuntimeError(
                "step() within skip_synchronize() would move this rank's weights by its own gradients, and those of the"
                " others by theirs: call optimizer.synchronize() before, or step() without skip_synchronize()"
            )

    @property
    def _is_finished(self) -> bool:
        # Within backward, a hook of the user's may run before this one's: nobody knows what it has seen.
        is_within = backward_run() >= 0
        return self._is_averaged and not self._passes and not self._additions and not is_within

    def _check_own(self) -> None:
        """Raise RuntimeError where a gradient was changed between two passes of a window.

        One to which a pass has added that an exception has ended was changed by that.
        """
        for parameter, mark in self._marks.items():
            own = parameter.grad
            if own is not None and has_changed(own, mark) and parameter not in self._additions:
                name, steps = self.layout.name(parameter), self._averaging.accum_steps
                raise RuntimeError(
                    f"the gradient of {name} was changed after backward pass {self._passes} of"
                    f" the accum_steps = {steps} that wrap() was given, before it was averaged over"
                    " the ranks: call optimizer.synchronize() first, then clip, unscale or change gradients"
                )

    def _check_shared(self) -> None:
        """Raise ConfigError where parameters are averaged in another way than this exchange was told.

        Not before it is used: whoever has gone on to another optimizer may still hold this one.
        """
        for other in self._all()[1:] if self._later else ():
            self._averaging.check_shared_with(other._averaging)

    def end_step(self, found_inf: Tensor | None = None) -> None:
        """Expect new gradients: those that there are have been used, or the optimizer has skipped by `found_inf`."""
        for exchange in self._all():
            exchange._is_averaged = False
            exchange.codec.settle(False if found_inf is None else found_inf)
            if exchange._arrivals is not None:
                exchange._arrivals = exchange._arrivals.agree(exchange.layout)

    def forget(self) -> None:
        """Start over: the gradients were cleared."""
        for exchange in self._all():
            if exchange._hooks:
                exchange.watch_parameters()
            exchange._is_averaged = False
            exchange.codec.settle(True)
            exchange._start_window()

    def yield_to(self, later: GradientExchange) -> None:
        """Leave the parameters that both have to `later`: a gradient must be averaged once."""
        shared = set(self._parameters()) & set(later._parameters())
        if shared and later is not self:
            self._yielded |= shared
            self._later.append(later)
            self._start_window()
            self.layout.build(self._trainable())

    def _all(self) -> list[GradientExchange]:
        """Return the exchanges that average the optimizer's parameters, in an order that is alike on all ranks."""
        found = [self]
        for exchange in found:  # grows meanwhile
            found += [other for other in exchange._later if other not in found]
        return found

    def _parameters(self) -> Sequence[nn.Parameter]:
        own = self.of_optimizer()
        return [parameter for parameter in own if parameter not in self._yielded] if self._yielded else own

    def watch_parameters(self) -> list[nn.Parameter]:
        """Note additions to all gradients of the optimizer, also of parameters that are frozen as yet.

        Returns those that were not noted before: new ones, and those whose insides were exchanged, without the hooks.
        """
        return self._hooks.watch(self._parameters()) if self._averaging.follows(self._parameters()) else []

    def note_addition(self, parameter: nn.Parameter) -> None:
        """Count that backward has added to a gradient; sends its bucket if that was the last of it.

        Raises:
            RuntimeError: the bucket has left before.
        """
        if parameter in self._yielded:
            return
        if not self._additions:
            self._follow_conversions()
        self._end_of_backward.expect(on_host=parameter.is_cpu)
        if self.layout.in_common:
            self.layout.note_change(parameter)
        count = self._additions[parameter] = self._additions.get(parameter, 0) + 1
        expected, bucket = self._expected.get(parameter), self.layout.bucket_of.get(parameter)
        if self._arrivals is not None and bucket is not None:
            self._arrivals.note(parameter, bucket, count, expected or 1)
        if expected is None or bucket is None or self._passes + 1 < self._averaging.accum_steps:
            return
        if count > expected and bucket.is_sent:
            raise RuntimeError(
                f"this backward pass has added to the gradient of {self.layout.name(parameter)} {count} times, an"
                f" earlier one {expected} times, and it has been sent: let checkpoints with use_reentrant=True run in"
                " every pass, or use use_reentrant=False; where an exception has ended the backward pass before, call"
                " optimizer.synchronize() and optimizer.zero_grad() behind that"
            )
        if count == expected:
            bucket.ready += 1
            if bucket.ready == bucket.num_learning:
                self.layout.note_ready(bucket)

    def end_pass(self) -> None:
        """Count a backward pass that is over; average at the end of a window. Collective then."""
        if not self._additions:
            return
        self._passes += 1
        for parameter, count in self._additions.items():
            if self._expected.get(parameter, 0) < count:
                self._expected[parameter] = count
        if self._passes >= self._averaging.accum_steps:
            self._send()
            self._additions.clear()  # this may be called once more for the same pass
            # Not before those of other optimizers have left: another rank may come to them in another order.
            self._end_of_backward.then(self._receive)
            return
        if self._arrivals is not None:
            self._arrivals.end_pass(self.layout.buckets)
        for parameter in self._additions:
            if parameter.grad is not None:
                self._marks[parameter] = mark_of(parameter.grad)
        self._additions.clear()

    @torch.no_grad()
    def _send(self) -> None:
        """Send what has not left; of what was frozen since a pass of this window, too: it has a gradient of it."""
        noted = (*self._marks, *self._additions) if self._hooks else self._parameters()
        frozen = {item for item in noted if not item.requires_grad and item.grad is not None}
        trainable = self._trainable()
        if frozen:
            there = frozen.union(trainable)
            trainable = [item for item in self._parameters() if item in there]
        self._marks.clear()  # they hold the gradients, and a gradient that is held is not replaced
        if self.layout.add(trainable):
            self.watch_parameters()
        for part in self.layout.parts:
            if not part.is_sent:
                part.send()

    @torch.no_grad()
    def _receive(self) -> None:
        """Wait for all: `.grad` then holds the mean, None where no rank has one."""
        self.layout.check_untouched()
        for part in self.layout.parts:
            part.receive()
        if self._averaging.has_square:  # now: buckets that are laid out anew know of none
            self.mean_square = torch.cat([bucket.square for bucket in self.layout.buckets]).double().sum()
        self._start_window()
        self._is_averaged = True
        trainable = self._trainable()
        if not self.layout.is_of(trainable):
            self.layout.build(trainable)

    def _follow_conversions(self) -> None:
        """Lay the buckets out anew where `model.to(...)` has converted a parameter, or their order is known now."""
        if not self.layout.is_under_way and self.layout.is_outdated():
            self.layout.build(self._trainable())

    def _start_window(self) -> None:
        self._passes = 0
        self._additions.clear()
        self._marks.clear()
        if self._arrivals is not None:
            self._arrivals.forget()
        for bucket in self.layout.buckets:
            bucket.ready = 0

    def _trainable(self) -> list[nn.Parameter]:
        return [parameter for parameter in self._parameters() if parameter.requires_grad]
