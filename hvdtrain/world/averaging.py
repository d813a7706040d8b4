"""The wrapped optimizer: the user's own object, whose gradients are the mean over the ranks when it steps."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from hvdtrain.errors import ConfigError
from hvdtrain.models.walk import Ordered, owned_by
from hvdtrain.optim.private_optimizer import SeenByScalers, without_record
from hvdtrain.world.buckets import FIRST_BUCKET_BYTES
from hvdtrain.world.codec import Codec
from hvdtrain.world.codecs import codec_of
from hvdtrain.world.exchange import GradientExchange
from hvdtrain.world.loaded_state import restore_types
from hvdtrain.world.offload import Offload, check_turns, step_in_parts
from hvdtrain.world.question import Question
from hvdtrain.world.sharded import Sharding
from hvdtrain.world.sparse_rows import sparse_parameters
from hvdtrain.world.step_hooks import hang_on_step
from hvdtrain.world.wrappable import check_can_be_wrapped

if TYPE_CHECKING:
    from hvdtrain.world.layout import Travelling
    from hvdtrain.world.world import World

_log = logging.getLogger("hvdtrain")


@dataclass(frozen=True, kw_only=True)
class Averaging:
    """How gradients are averaged over the ranks."""

    accum_steps: int = 1
    """Backward passes in an optimizer step. They are summed before the average is taken: divide the loss by them.

    The gradients are averaged at the end of the last one. With 1, several passes before a step are right too, and each
    averages: all ranks must then make equally many."""
    compression: str | Codec = "none"
    """Format of the gradients on the wire: `fp16`, `powersgd:4` and so on as `--comm.compression` has them, or a codec,
    such as `PowerSGD(4, min_size=1000, warmup_steps=100)` or one of your own."""
    op: Literal["average", "adasum"] = "average"
    """adasum combines the ranks' gradients by their directions (arXiv:2006.02924) instead of averaging, before the
    optimizer sees them. All ranks then hold the same gradient, and what follows, such as clipping, sees that one."""
    bucket_bytes: int = 25 << 20
    """Gradients travel in parts of this size, each as soon as backward has finished it."""
    has_square: bool = False
    """Also average the squared norms of the ranks' own gradients, for the gradient noise scale."""
    gradient_as_bucket_view: bool = False
    """Let gradients move into the buffers that are sent as soon as these are complete: 4 bytes a parameter less, of 20
    with AdamW. A hook of yours that reads other parameters' `.grad` while backward runs then finds them on the wire."""
    follows_backward: bool = False
    """Lay the buckets out anew after the first step, in the order in which rank 0 has finished gradients. Between more
    than two ranks that changes last bits: who goes on where a run has stopped sets `bucket_order` to what it was."""
    shard: bool = False
    """Keep the optimizer's state in parts, one on each rank (`world/sharded.py`). The optimizer's groups then hold this
    rank's pieces, and their `grad` is its part of the mean: for the trainer, which clips and saves by them."""
    waits_for_caller: bool = False
    """Average in `synchronize`, or in `step`, alone where all gradients are so few that backward could send none of
    them before its end: then nothing is called for each of them. For the trainer, and for whoever calls `synchronize`
    once a step, after its last backward pass and before gradients are looked at."""
    offload: bool = False
    """Keep the optimizer's state in host memory, and take it to the parameters' device a part at a time."""
    warns_of_copies: bool = True
    """Say so where all ranks compute the same gradient in the first steps: they read the same samples, then."""

    def __post_init__(self) -> None:
        for name in ("accum_steps", "bucket_bytes"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ConfigError(f"{name} = {value!r} must be a whole number greater than 0")
        if self.op not in ("average", "adasum"):
            raise ConfigError(f"op = {self.op!r} must be 'average' or 'adasum'")
        is_compressed = self.codec().name != "none"
        if self.op == "adasum" and is_compressed:
            raise ConfigError("--comm.op adasum works on full gradients: leave out --comm.compression")
        if self.has_square and (self.op == "adasum" or is_compressed):
            raise ConfigError(_NO_SQUARE)

    def follows(self, parameters: Iterable[nn.Parameter]) -> bool:
        """Return whether what backward adds to their gradients is noted: not where all of it leaves at its end."""
        room = min(FIRST_BUCKET_BYTES, self.bucket_bytes)
        return not self.waits_for_caller or sum(parameter.nbytes for parameter in parameters) > room

    def codec(self) -> Codec:
        """Return the codec, a new one where it was named."""
        return codec_of(self.compression) if isinstance(self.compression, str) else self.compression

    def conflict_with(self, other: Averaging) -> str:
        """Say by which field one gradient cannot be averaged both ways; empty where it can."""
        if self.accum_steps != other.accum_steps:
            return f"accum_steps = {self.accum_steps}, the other {other.accum_steps}"
        if self.op != other.op:
            return f"op = {self.op}, the other {other.op}"
        if self.shard != other.shard:
            return f"shard = {self.shard}, the other {other.shard}"
        own, others = self.codec(), other.codec()
        if own is not others and (own.name != others.name or type(own) is not type(others)):
            return f"compression = {own.name}, the other {others.name}"
        return "squared norms to average, of all its parameters" if self.has_square or other.has_square else ""


_NO_SQUARE = (
    "--health.noise-scale needs averaged, dense gradients in their own type: leave out --comm.op, --comm.compression"
    " and sparse embeddings"
)


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
        what is left. Backward passes that a rank did not make count as zero gradients.

        Raises:
            RuntimeError: a gradient was changed before it was averaged.
            ConfigError: an optimizer that was wrapped later has parameters of this one, and averages in another way.
        """
        if self._exchange is not None:
            self._exchange.finish()

    @contextlib.contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """Let `step()` within not average first; Horovod's optimizer has a context of this name."""
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
                    " the rest of them: end this rank, or call synchronize() before zero_grad()"
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
    if averaging.has_square and sparse:
        raise ConfigError(_NO_SQUARE)
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
    codec.meet(model)
    layout = sharding.layout(prefix, codec) if sharding else None
    wrapped._exchange = exchange = GradientExchange(world, prefix, parameters, names, sparse, averaging, codec, layout)
    world.claim_gradients(exchange)

    hang_on_step(world, wrapped, exchange, model, prefix)
    if sharding is not None:
        wrapped.register_step_post_hook(lambda *_: sharding.gather())
    return wrapped
