"""What a gradient becomes on the wire: one object knows a format's encoding, its size, its error and its memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from hvdtrain.world.world import World


class Codec(ABC):
    """A format of gradients on the wire.

    A bucket of gradients is written into a flat buffer, each rank's divided by the number of ranks; `start` puts it on
    the wire, and what it returns waits for the sum, which is the mean. A codec with one all-reduce defines `encode` and
    `decode`; one with several rounds of collectives (low rank, quantised) replaces `start`. What it remembers of a
    bucket, such as the error that rounding has left, is kept under the bucket's name and saved by `state_dict`.

    One object serves one optimizer.
    """

    name: str
    """As `--comm.compression` and `Averaging(compression=...)` say it."""
    is_elementwise: bool = True
    """Each number travels by itself, zero as zero: a bucket's counts can then travel behind its gradients."""
    has_exact_tail: bool = False
    """What lies in a part behind the tensors that `lay_out` has named is added as it is: counts can travel there."""
    is_approximate: bool = False
    """The mean of a step may be far off: what it leaves out is remembered, and comes in later steps."""
    gains_by_parts: bool = True
    """Bytes are most of what a bucket takes: what backward finishes last then leaves in ever smaller parts. Not where
    few bytes are left, and each part waits for a network once or twice."""
    native_types: Collection[torch.dtype] = ()
    """Types of gradients that are sent undivided as they are, past `start`, where the world averages them as exactly as
    this codec does. Not inherited by a class that encodes, decodes or sends in a way of its own."""

    def is_native(self, world: World, dtype: torch.dtype) -> bool:
        """Return whether the world itself averages gradients of type `dtype` as they are."""
        own = next(kind for kind in type(self).__mro__ if _WAYS & vars(kind).keys())
        return world.adds_bfloat16 and dtype == torch.bfloat16 and dtype in vars(own).get("native_types", ())

    @property
    def remembers(self) -> bool:
        """Return whether it has a state that a run goes on with."""
        return type(self).load_state_dict is not Codec.load_state_dict

    @abstractmethod
    def buffer_type(self, dtype: torch.dtype) -> torch.dtype:
        """Return the type of the flat buffer that gradients of type `dtype` are written into."""

    @abstractmethod
    def wire_bytes(self, count: int, dtype: torch.dtype) -> int:
        """Return the bytes that one rank hands over for `count` gradients of type `dtype`."""

    @abstractmethod
    def tolerance(self, dtype: torch.dtype) -> float:
        """Return how far a mean may be off for its format, relative to the largest gradient of a tensor."""

    def encode(self, name: str, part: Tensor) -> Tensor:
        """Return what is summed over the ranks for this rank's `part`, `(n,)`, of the bucket `name`."""
        return part

    def decode(self, name: str, total: Tensor) -> Tensor:
        """Return the mean, `(n,)`, for the sum of what the ranks have encoded."""
        return total

    def start(self, world: World, prefix: str, name: str, part: Tensor) -> Callable[[], Tensor]:
        """Begin to average the bucket `name`; returns the function that waits for the mean, `(n,)`. Collective.

        `part` may be overwritten. The waiting functions of several buckets are called in the same order on all ranks,
        and may themselves make further collectives. The names of these begin with `prefix.name`: the prefix tells
        optimizers apart, and may be another one in the next run.
        """
        wait = world.start_all_reduce_(self.encode(name, part), "sum", f"{prefix}.{name}")
        return lambda: self.decode(name, wait())

    def meet(self, model: nn.Module) -> None:  # noqa: B027  most need not know
        """Learn of the model whose gradients it will send, before any bucket is laid out; once more changes nothing.

        Raises:
            ConfigError: what it was told of parameters does not fit them.
        """

    def spare(self, names: Collection[str]) -> None:  # noqa: B027  most send all alike
        """Send parameters of these names, and no others, as they are whatever their shapes."""

    def is_exact(self, name: str) -> bool:
        """Return whether the parameter of this name is sent as it is, whatever its shape."""
        return False

    def lay_out(self, name: str, tensors: Sequence[tuple[str, torch.Size]]) -> None:  # noqa: B027  most need not know
        """Learn of which tensors, by name and shape, the bucket `name` is made, from its first number on.

        Called before the bucket is first averaged, and again where it is laid out anew: what is remembered of a tensor
        goes with the tensor. A bucket of which nothing was said is one tensor.
        """

    def received(self, name: str, users: Tensor | None) -> None:  # noqa: B027  most remember nothing
        """Learn, once the mean of the bucket is there, which of its tensors some rank has a gradient for: `(n,)`, > 0.

        The mean of the others is not used. None: all are.
        """

    def settle(self, skipped: bool | Tensor) -> None:  # noqa: B027  most remember nothing
        """Learn that the means since the last call were used in a step, or dropped: then nothing is remembered of them.

        `skipped` is alike on all ranks; a tensor, a scalar greater than 0 where the step was skipped, is not looked at.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return what it remembers: this rank's own, not alike on all ranks."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027  most remember nothing
        """Take over what `state_dict` returned."""

    def merged(self, states: Sequence[Mapping[str, Any]], size: int) -> dict[str, Any] | None:
        """Return what each of `size` ranks goes on with for the states of another number; None: it begins anew."""
        return None

    def left_over(self) -> Mapping[str, Tensor]:
        """Return what this rank has not sent yet, by tensor: its sum over the ranks is missing in the means so far.

        In the order in which numbers lie in the bucket, which is that of the parameter's memory.
        """
        return {}

    def tensor_bytes(self, shape: torch.Size, dtype: torch.dtype) -> int:
        """Return the bytes that one rank hands over for a gradient of this shape and type."""
        return self.wire_bytes(shape.numel(), dtype)

    def bytes_of(self, name: str, shape: torch.Size, dtype: torch.dtype) -> int:
        """Return the bytes that one rank hands over for the gradient of the parameter of this name."""
        return self.wire_bytes(shape.numel(), dtype) if self.is_exact(name) else self.tensor_bytes(shape, dtype)

    def kept_bytes(self, shape: torch.Size, dtype: torch.dtype) -> int:
        """Return the memory that it takes, besides what it sends, for a gradient of this shape and type."""
        return 0

    def link_bytes(self, handed: int, size: int) -> int:
        """Return the bytes that each of `size` ranks sends on its link where it hands over `handed`, in a ring."""
        return 2 * (size - 1) * handed // size

    def about(self, tensors: Sequence[tuple[str, torch.Size]], each: str = "step") -> str:
        """Return a line for the person who starts a run, if there is something to say.

        Args:
            tensors: names and shapes of what travels.
            each: when it does, in a word: "step", or "average" of local updates.
        """
        return ""


class AsTheyAre(Codec):
    """Gradients travel in their own type; bfloat16 as fp32 where the world cannot add it, or would round each hop."""

    name = "none"
    native_types = (torch.bfloat16,)

    def buffer_type(self, dtype: torch.dtype) -> torch.dtype:
        """Return the type itself, fp32 for bfloat16."""
        return torch.float32 if dtype == torch.bfloat16 else dtype

    def wire_bytes(self, count: int, dtype: torch.dtype) -> int:
        """Return the bytes of the buffer."""
        return count * self.buffer_type(dtype).itemsize

    def tolerance(self, dtype: torch.dtype) -> float:
        """Return what sums in another order may differ by."""
        return {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 1e-2)


class Fp16(Codec):
    """Gradients travel, and are added, as fp16: 11 bits, from 6e-8 to 65504."""

    name = "fp16"

    def buffer_type(self, dtype: torch.dtype) -> torch.dtype:
        """Return fp16: gradients are rounded as they are written into the buffer."""
        return torch.float16

    def wire_bytes(self, count: int, dtype: torch.dtype) -> int:
        """Return two bytes a gradient."""
        return 2 * count

    def tolerance(self, dtype: torch.dtype) -> float:
        """Return what rounding each part, and each partial sum, to 11 bits may come to."""
        return 1e-2


class Bf16(Codec):
    """Gradients travel as bfloat16: 8 bits, with the range of fp32.

    Each rank is sent its part of the bucket by every other; it adds them as fp32 in the order of the ranks, rounds the
    mean to bfloat16, and sends it to all. On the wire that is half of an fp32 all-reduce, and each number is rounded
    twice: as a rank's part, and as the mean; gradients that are bfloat16 once. A world that adds bfloat16 does that in
    one all-reduce. In others (NCCL would round at each hop) the ranks do, by an all-to-all and an all-gather of bits.
    """

    name = "bf16"
    native_types = (torch.bfloat16,)

    def buffer_type(self, dtype: torch.dtype) -> torch.dtype:
        """Return fp32, or fp64 for fp64: the sum is taken in it."""
        return torch.float64 if dtype == torch.float64 else torch.float32

    def wire_bytes(self, count: int, dtype: torch.dtype) -> int:
        """Return two bytes a gradient."""
        return 2 * count

    def tolerance(self, dtype: torch.dtype) -> float:
        """Return what rounding to 8 bits twice may come to."""
        return 1e-2

    def start(self, world: World, prefix: str, name: str, part: Tensor) -> Callable[[], Tensor]:
        """Send each rank its part of the bucket; the means are gathered while waiting."""
        if world.adds_bfloat16 and part.dtype == torch.float32:
            total = world.start_all_reduce_(part.bfloat16(), "sum", f"{prefix}.{name}")
            return lambda: part.copy_(total())
        share = -(-len(part) // world.size)
        wire = torch.zeros(share * world.size, dtype=torch.bfloat16, device=part.device)
        wire[: len(part)] = part
        wait = world.start_all_to_all(wire.view(torch.int16), f"{prefix}.{name}.parts")

        def finish() -> Tensor:
            parts = wait().view(torch.bfloat16).view(world.size, share)
            mean = parts.to(part.dtype).sum(0).bfloat16()
            means = world.start_all_gather(mean.view(torch.int16), f"{prefix}.{name}.means")()
            return part.copy_(means.view(torch.bfloat16)[: len(part)])

        return finish


_WAYS = {"buffer_type", "encode", "decode", "start"}
