"""A world of so many ranks that all do what this one does: what a codec sends, and what it computes, without a network.

On the device `meta`, where tensors have shapes and no numbers, it tells the bytes for any number of ranks at no cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hvdtrain.process.launch import Launch
from hvdtrain.world.carriers import ReduceOp
from hvdtrain.world.codec import Codec
from hvdtrain.world.solo import SoloWorld
from hvdtrain.world.world import World

Kind = Literal["all_reduce", "all_gather", "all_to_all"]


@dataclass(frozen=True)
class Message:
    """What one rank hands over in a collective."""

    kind: Kind
    num_bytes: int
    dtype: torch.dtype
    is_first: bool = True
    """Whether it leaves when its bucket is ready; the others leave when the first ones have arrived."""


@dataclass(frozen=True)
class Cargo:
    """The gradients of a bucket."""

    shapes: tuple[torch.Size, ...]
    dtype: torch.dtype
    exact: tuple[int, ...] = ()
    """Places of the tensors that travel as they are whatever the codec would do with their shapes."""

    def buffer(self, codec: Codec, world: World) -> Tensor:
        """Return random gradients, and the shares of ranks that have them, as they lie in a bucket's buffer: `(n,)`."""
        count = sum(shape.numel() for shape in self.shapes) + len(self.shapes)
        dtype = self.dtype if codec.is_native(world, self.dtype) else codec.buffer_type(self.dtype)
        if world.device.type == "meta":
            return torch.zeros(count, dtype=dtype, device=world.device)
        generator = torch.Generator(world.device).manual_seed(0)
        return torch.randn(count, generator=generator, device=world.device).to(dtype)


class EchoWorld(SoloWorld):
    """One process that stands for `size` ranks of equal parts.

    Args:
        device: of the tensors.
        size: number of ranks.
        adds_bfloat16: as the world that it stands for.
    """

    adds_bfloat16 = False

    def __init__(self, device: torch.device, size: int, *, adds_bfloat16: bool = False) -> None:
        super().__init__(device, Launch("none"))
        self.size = size
        self.adds_bfloat16 = adds_bfloat16
        self.messages: list[Message] = []
        self.is_first = True
        """Whether what leaves now waits for no other message."""

    def start_all_reduce_(self, tensor: Tensor, op: ReduceOp | Literal["adasum"], name: str) -> Callable[[], Tensor]:
        """Note it; returns a function that returns `tensor`."""
        self._note("all_reduce", tensor)
        return lambda: tensor

    def start_all_gather(self, tensor: Tensor, name: str) -> Callable[[], Tensor]:
        """Note it; returns a function that returns it as often as there are ranks."""
        self._note("all_gather", tensor)
        return lambda: tensor.repeat(self.size, *[1] * (tensor.dim() - 1))

    def start_all_to_all(self, tensor: Tensor, name: str) -> Callable[[], Tensor]:
        """Note it; returns a function that returns this rank's own part as often as there are ranks."""
        self._note("all_to_all", tensor)
        return lambda: tensor[: len(tensor) // self.size].repeat(self.size, *[1] * (tensor.dim() - 1))

    def _note(self, kind: Kind, tensor: Tensor) -> None:
        self.messages.append(Message(kind, tensor.nbytes, tensor.dtype, self.is_first))


def begin_exchange(
    world: World, codec: Codec, prefix: str, cargoes: Sequence[Cargo], buffers: Sequence[Tensor]
) -> Callable[[], None]:
    """Put buckets on the wire as training does; returns what waits for their means and ends the step. Collective."""
    codec.spare([f"{i}.{k}" for i, cargo in enumerate(cargoes) for k in cargo.exact])
    waits: list[tuple[str, Callable[[], Tensor]]] = []
    for i, (cargo, buffer) in enumerate(zip(cargoes, buffers, strict=True)):
        name = f"bucket.{i}"
        if codec.is_native(world, cargo.dtype):
            waits.append((name, world.start_all_reduce_(buffer, "mean", f"{prefix}.{name}")))
            continue
        codec.lay_out(name, [(f"{i}.{k}", shape) for k, shape in enumerate(cargo.shapes)])
        waits.append((name, codec.start(world, prefix, name, buffer)))

    def end() -> None:
        for name, wait in waits:
            wait()
            codec.received(name, None)
        codec.settle(False)

    return end


def messages_of(codec: Codec, cargo: Cargo, size: int, *, adds_bfloat16: bool = False) -> list[Message]:
    """Return what each of `size` ranks hands over for a bucket in a step: the codec itself sends it, without numbers.

    Args:
        codec: a new one.
        cargo: the bucket.
        size: number of ranks.
        adds_bfloat16: as the world's.
    """
    world = EchoWorld(torch.device("meta"), size, adds_bfloat16=adds_bfloat16)
    end = begin_exchange(world, codec, "echo", [cargo], [cargo.buffer(codec, world)])
    world.is_first = False
    end()
    return world.messages
