"""Objects with tensors on their way: apart from their pickle, and, where each rank gets its own, to that rank alone."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from hvdtrain.errors import UsageError, one_line
from hvdtrain.models.private_torch import is_fake
from hvdtrain.world.carriers import bits_of

if TYPE_CHECKING:
    from hvdtrain.world.world import World

ROUND_BYTES = 64 << 20
"""That are sent at a time, to all ranks together: rank 0 holds them beside the objects."""
_NOTHING = torch.zeros(0, dtype=torch.uint8)
Scatter = Callable[[Tensor, Sequence[int], str], Tensor]
"""Sends parts of flat bytes, of these lengths, from rank 0 to one rank each; returns this rank's. Collective."""


def scattered(world: World, values: Sequence[Any] | None, name: str, scatter: Scatter) -> Any:
    """Return this rank's of the values that rank 0 has, one for each rank; tensors are in host memory. Collective.

    Pickles come first, then the bytes of the tensors in them, in rounds: no rank receives another one's.

    Raises:
        UsageError: a value does not pickle.
    """
    of_ranks: list[list[Tensor]] = [[] for _ in range(world.size)]
    values = values if world.rank == 0 else None
    outlines = world.together(lambda: _outlines(values, of_ranks, name), f"{name}.outlines")
    joined = torch.frombuffer(bytearray(b"".join(outlines)), dtype=torch.uint8) if any(outlines) else _NOTHING
    outline = scatter(joined, [*map(len, outlines)], name)
    sizes = [sum(tensor.nbytes for tensor in tensors) for tensors in of_ranks]
    most, step = world.broadcast_object(max(sizes), name), max(1, ROUND_BYTES // world.size)
    pickled, own = b"", list[Tensor]()
    if world.rank:
        pickled, forms = pickle.loads(outline.numpy().tobytes())
        own = [torch.empty(shape, dtype=dtype) for shape, dtype in forms]
    for start in range(0, most, step):
        parts = [part for tensors in of_ranks for part in _cut(tensors, start, start + step)]
        lengths = [max(0, min(size, start + step) - start) for size in sizes]
        received = scatter(torch.cat(parts) if parts else _NOTHING, lengths, name)
        targets = [*_cut(own, start, start + step)]
        for target, part in zip(targets, torch.split(received, [len(target) for target in targets]), strict=True):
            target.copy_(part)
    return values[0] if values is not None else loaded(pickled, own)


def _outlines(values: Sequence[Any] | None, of_ranks: list[list[Tensor]], name: str) -> list[bytes]:
    """Return each rank's pickle, with the forms of its tensors, which are put into `of_ranks`; rank 0 keeps its own."""
    outlines = [b""] * len(of_ranks)
    for rank in range(1, len(of_ranks) if values is not None else 1):
        pickled = dumped_or_why(cast(Any, values)[rank], of_ranks[rank])
        if isinstance(pickled, str):
            raise UsageError(f"'{name}' for rank {rank} cannot be sent, as it does not pickle: {pickled}")
        of_ranks[rank] = [tensor.cpu().contiguous() for tensor in of_ranks[rank]]
        outlines[rank] = pickle.dumps((pickled, [(tensor.shape, tensor.dtype) for tensor in of_ranks[rank]]))
    return outlines


def _cut(tensors: Sequence[Tensor], start: int, end: int) -> Iterator[Tensor]:
    """Yield views of what lies from `start` to `end` in the bytes of contiguous tensors, one after the other."""
    offset = 0
    for tensor in tensors:
        first, last = max(start - offset, 0), min(end - offset, tensor.nbytes)
        if first < last:
            yield bits_of(tensor, "a saved state")[0].view(-1).view(torch.uint8)[first:last]
        offset += tensor.nbytes


@dataclass(frozen=True)
class _Apart:
    """Stands for a value with tensors of a GPU in it."""

    pickled: bytes
    tensors: list[Tensor]
    """In host memory."""
    were_on_gpu: list[bool]


def without_gpus(value: Any) -> Any:
    """Return what travels in a value's place: pickled as it is, its tensors would go to the sender's GPU.

    That is another rank's there, which would take memory of it, or is not to be seen at all.
    """
    tensors: list[Tensor] = []
    pickled = dumped_or_why(value, tensors)
    if isinstance(pickled, str):  # cloudpickle knows more, or says why not
        return value
    were_on_gpu = [tensor.is_cuda for tensor in tensors]
    return _Apart(pickled, [tensor.cpu() for tensor in tensors], were_on_gpu) if any(were_on_gpu) else value


def on_own_gpu(value: Any, device: torch.device) -> Any:
    """Return what another rank has given to `without_gpus`, its GPU's tensors on this rank's device."""
    if not isinstance(value, _Apart):
        return value
    pairs = zip(value.tensors, value.were_on_gpu, strict=True)
    return loaded(value.pickled, [tensor.to(device) if was_on_gpu else tensor for tensor, was_on_gpu in pairs])


def dumped_or_why(value: Any, tensors: list[Tensor]) -> bytes | str:
    """Return what `dumped` does, or in a text why the value does not pickle: the other ranks wait to be told."""
    try:
        return dumped(value, tensors)
    except Exception as error:  # objects have many ways to refuse
        tensors.clear()
        return one_line(error)


def dumped(value: Any, tensors: list[Tensor]) -> bytes:
    """Return a value pickled without the plain tensors in it, which are appended to `tensors`."""
    file = io.BytesIO()
    _TensorPickler(file, tensors).dump(value)
    return file.getvalue()


def loaded(pickled: bytes, tensors: Sequence[Tensor]) -> Any:
    """Return what was `dumped`, with these tensors in it."""
    return _TensorUnpickler(io.BytesIO(pickled), tensors).load()


class _TensorPickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self.tensors = tensors
        self._met: dict[int, tuple[int, Tensor]] = {}
        """The places of tensors that were met, which are held, so that no other one gets their number: one that stands
        at two places is one tensor again where it arrives."""

    def persistent_id(self, obj: Any) -> int | None:
        # Those of other layouts cannot be sent by themselves; a fake one stands for one that can.
        if is_fake(obj):
            pass
        elif type(obj) is not Tensor or obj.layout != torch.strided or obj.is_quantized or obj.is_nested or obj.is_meta:
            return None
        if id(obj) not in self._met:
            self._met[id(obj)] = len(self.tensors), obj
            self.tensors.append(obj.detach())
        return self._met[id(obj)][0]


class _TensorUnpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: Sequence[Tensor]) -> None:
        super().__init__(file)
        self.tensors = tensors

    def persistent_load(self, pid: Any) -> Tensor:
        tensor: Tensor = self.tensors[pid]
        return tensor
