"""The wrapped optimizer: the user's own object, whose gradients are the mean over the ranks when it steps."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from hvdtrain.errors import ConfigError
from hvdtrain.models.walk import Ordered, owned_by
from hvdtrain.optim.private_optimizer import SeenByScalers, without_record
from hvdtrain.world.alike import check_same_wrap
from hvdtrain.world.averaging import NO_SQUARE, Averaging
from hvdtrain.world.codec import Codec
from hvdtrain.world.exchange import GradientExchange
from hvdtrain.world.loaded_state import restore_types
from hvdtrain.world.offload import Offload, check_turns, step_in_parts
from hvdtrain.world.question import Question
from hvdtrain.world.settings_watch import SettingsWatch
from hvdtrain.world.sharded import Sharding
from hvdtrain.world.sparse_rows import sparse_parameters
from hvdtrain.world.step_hooks import hang_on_step
from hvdtrain.world.wrappable import check_can_be_wrapped

if TYPE_CHECKING:
    from hvdtrain.world.layout import Travelling
    from hvdtrain.world.world import World

_log = logging.getLogger("hvdtrain")


class WrappedOptimizer(SeenByScalers):
    """A torch optimizer whose gradients are averaged over all ranks; also an instance of its own class (`AdamW`, ...).

    Made by `World.wrap` out of the user's optimizer, in place: schedulers, hooks and profilers that hold the object go
    on working.
    """

    _inner: type[torch.optim.Optimizer]
    """The class that it had before."""
    _exchange: GradientExchange | None
    """None where there is one rank."""
    _world: World
    _should_synchronize: bool
    sharding: Sharding | None
    """Which rank keeps what of the state; None: each keeps all of it."""
    offload: Offload | None
    """Where the state lies between steps; None: where the parameters are."""

    def before_scaler(self) -> None:
        """Refuse loss scalers where each rank has a part of the gradients, or its own still."""
        if self.sharding is not None:
            raise ConfigError(
                "a GradScaler looks at the gradients that this rank has, which are a part of them with shard=True:"
                " ranks would leave out different steps. Train in bf16, which needs no scaler, or leave out shard=True"
            )
        if self._exchange is not None and self._exchange.is_waiting:
            raise RuntimeError(
                "with waits_for_caller=True the gradients are each rank's own as yet, and ranks would leave out"
                " different steps: call synchronize() after backward(), before the GradScaler's unscale_() and step()"
            )

    @property
    def mean_square(self) -> Tensor | None:
        """Return the mean over the ranks of the squared norm of each one's own gradient, a float64 scalar.

        As of the last `synchronize`, in units of the loss that each rank has differentiated; None where it was not
        asked for, or there is one rank only.
        """
        return None if self._exchange is None else self._exchange.mean_square

    @property
    def question(self) -> Question | None:
        """Return what travels with the gradients besides them; None where there is one rank only."""
        return None if self._exchange is None else self._exchange.layout.question

    @property
    def bucket_order(self) -> list[str]:
        """Return the order in which backward finishes parameters, by name; one that is known is set ahead."""
        return [] if self._exchange is None else self._exchange.order

    @bucket_order.setter
    def bucket_order(self, names: list[str]) -> None:
        if self._exchange is not None:
            self._exchange.order = names

    @property
    def codec(self) -> Codec | None:
        """Return what gradients become on the wire, with what it remembers; None where there is one rank."""
        return None if self._exchange is None else self._exchange.codec

    def take_along(self, part: Travelling) -> None:
        """Send something of the caller's behind the gradients of every step, where there are several ranks.

        All ranks do so alike, before the first backward pass.
        """
        if self._exchange is not None:
            self._exchange.layout.companions.append(part)

    def synchronize(self) -> None:
        """Finish averaging: afterwards every rank's `.grad` holds the mean over the ranks. Collective.

        The last of `accum_steps` backward passes has done so by itself, and then this does nothing. Where a rank may
        have had fewer, or none, call it before gradients are looked at or changed (clipping, unscaling); `step` does
        what is left. Backward passes that a rank did not make count as zero gradients. With `waits_for_caller=True` a
        small model's gradients are averaged by each call.

        Raises:
            RuntimeError: a gradient was changed before it was averaged.
            ConfigError: an optimizer that was wrapped later has parameters of this one, and averages in another way.
        """
        if self._exchange is not None:
            self._exchange.look_again()
            self._exchange.finish()

    @contextlib.contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """Let `step()` within not average first; Horovod's optimizer has a context of this name.

        Raises:
            RuntimeError: by `step()`, where gradients are each rank's own still: `synchronize` was not called.
        """
        self._should_synchronize = False
        try:
            yield
        finally:
            self._should_synchronize = True

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """Clear the gradients, as the optimizer's own class does: torch's takes `set_to_none`.

        Raises:
            RuntimeError: an exception has ended backward while gradients were on the wire.
        """
        if self._exchange is not None:
            if self._exchange.is_under_way:
                raise RuntimeError(
                    "backward() has failed on this rank while gradients were on the wire, and the other ranks wait for"
                    " the rest of them: end this rank, or call optimizer.synchronize() before optimizer.zero_grad()"
                )
            self._exchange.forget()
        for parameter in self.sharding.parameters if self.sharding is not None else ():
            parameter.grad = None
        if args or kwargs or self._inner.zero_grad is not torch.optim.Optimizer.zero_grad:
            self._inner.zero_grad(self, *args, **kwargs)
            return
        if self.sharding is not None:
            self.sharding.drop_gradients()
        for group in self.param_groups:  # what torch does too, in a tenth of the time
            for parameter in group["params"]:
                parameter.grad = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its gradients are averaged from the next backward pass on. Not with `shard` (ConfigError)."""
        if self.sharding is not None:
            raise ConfigError("an optimizer with --optim.shard takes no further parameters: give it all at first")
        self._inner.add_param_group(self, param_group)
        if self._exchange is not None:
            self._exchange.watch_parameters()
            self._world.claim_gradients(self._exchange)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load the state, every tensor in the type that it was saved in."""
        load: Any = self._inner.load_state_dict
        state_dict = self.offload.load(self, load, state_dict) if self.offload else load(self, state_dict) or state_dict
        restore_types(self, state_dict)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "a wrapped optimizer is tied to its ranks and cannot be copied or pickled: use its state_dict(), or copy"
            " the optimizer first and wrap the copy"
        )


def wrap_optimizer(
    world: World, optimizer: torch.optim.Optimizer, model: nn.Module, averaging: Averaging
) -> WrappedOptimizer:
    """Turn `optimizer` itself into one that averages its gradients over the ranks of `world`, and return it.

    Its class changes to one derived from what it was, and averaging hangs on torch's own hook before a step: whichever
    way `step` is called, by the user, a scheduler's wrapper or a scaler, it averages, and step hooks run once.

    Raises:
        ConfigError: it is wrapped already, or none that can be, or the squared norms cannot be had here.
    """
    check_can_be_wrapped(optimizer, WrappedOptimizer)
    sparse = sparse_parameters(model)
    if isinstance(optimizer, torch.optim.SparseAdam):  # which takes no others, whatever has computed them
        sparse |= set(owned_by(optimizer))
    if averaging.has_square and sparse:
        raise ConfigError(NO_SQUARE)
    if averaging.op == "adasum" and sparse:
        raise ConfigError("--comm.op adasum needs dense gradients: leave it out, or sparse embeddings")
    inner = type(optimizer)
    names = {parameter: name for name, parameter in model.named_parameters()}
    base, attributes = world.optimizer_type(inner, averaging)
    is_sharded = averaging.shard and world.size > 1
    codec = averaging.codec()
    if codec.remembers and world.serves_another(codec):
        raise ConfigError(
            f"this object of {codec.name} belongs to another optimizer already, and what it remembers of one must not"
            f" be sent with the other's gradients: make one for each, or name it, as compression={codec.name!r}"
        )
    if averaging.offload:
        check_turns(optimizer)
    sharding = Sharding(world, optimizer, names, averaging, sparse) if is_sharded else None
    optimizer.__dict__.update(attributes, _should_synchronize=True, _exchange=None, _world=world)
    optimizer.__dict__.update(sharding=sharding, offload=Offload(optimizer) if averaging.offload else None)
    # `step` is named again: a library's class may have another, and torch would hang its hooks on that too.
    step = step_in_parts(inner) if averaging.offload else without_record(inner.step)
    members = {"_inner": inner, "step": step, "__doc__": inner.__doc__, "__module__": inner.__module__}
    optimizer.__class__ = type(inner.__name__, (WrappedOptimizer, base), members)
    wrapped = cast(WrappedOptimizer, optimizer)
    if world.size == 1:
        return wrapped
    in_order = Ordered(names)

    of_ranks = weakref.ref(wrapped)  # no circle: whoever drops it drops it on all ranks at once

    def parameters() -> list[nn.Parameter]:
        own = owned_by(owner) if (owner := of_ranks()) is not None else []
        return in_order(sharding.parameters if sharding else own)

    world.num_wraps += 1
    prefix = f"gradients.{world.num_wraps}"
    named = [(names.get(item, f"parameter {place}"), item) for place, item in enumerate(parameters())]
    check_same_wrap(world, named, sharding.parameters if sharding else owned_by(wrapped), inner.__name__, averaging)
    codec.meet(model)
    layout = sharding.layout(prefix, codec) if sharding else None
    wrapped._exchange = exchange = GradientExchange(world, prefix, parameters, names, sparse, averaging, codec, layout)
    world.claim_gradients(exchange)
    if averaging.warns_of_copies:
        wrapped.take_along(SettingsWatch(world, wrapped, f"{prefix}.settings"))

    hang_on_step(world, wrapped, exchange, model, prefix)
    if sharding is not None:
        wrapped.register_step_post_hook(lambda *_: sharding.gather())
    return wrapped
