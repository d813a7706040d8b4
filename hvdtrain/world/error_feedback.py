"""What codecs share that send less than there is: the rest is remembered, and added to the next gradient.

With `g` the gradient of a step, divided by the number of ranks, and `e` what this rank remembers (arXiv:1901.09847):

    m = g + e        what there is to send
    s = sent(m)      what is sent: the sum of it over the ranks is the mean that the step takes
    e = m - s        what is remembered

So over any number of steps, sum of means + sum over the ranks of what they remember = sum of the mean gradients.

What is remembered belongs to a tensor, by its name, whichever bucket it travels in. It stays as it was

- of a bucket whose result is not finite: the step will be skipped, and a number that is not finite would stay for good;
- of a tensor that no rank has a gradient for: what comes out for it is not used;
- of all tensors, where the step is skipped, or gradients are cleared without one: what was sent then has moved nothing.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hvdtrain.models.private_torch import copy_all_
from hvdtrain.settings.compression import AUTO
from hvdtrain.settings.units import in_units
from hvdtrain.world.codec import AsTheyAre, Codec
from hvdtrain.world.exact import exact_names
from hvdtrain.world.memory import Memory, merged

if TYPE_CHECKING:
    from hvdtrain.world.world import World

MIN_SIZE = 1024
"""Tensors of fewer numbers are sent as they are, unless another size is given."""
_EXACT = AsTheyAre()


@dataclass(frozen=True)
class Piece:
    """A tensor of a bucket that is compressed."""

    name: str
    place: int
    """Its number in the bucket."""
    whole: Tensor
    """What there is to send, a view of the bucket's buffer; becomes the mean."""


@dataclass(frozen=True)
class Parts:
    """A bucket: what is compressed, and what is added up as it is."""

    pieces: Sequence[Piece]
    exact: Sequence[Tensor]
    """Views of the bucket's buffer, flat: small tensors, and what lies behind all tensors."""
    spared: Sequence[Piece]
    """The tensors among these."""

    def take_exact(self, flat: Tensor) -> None:
        """Put the sums, `(n,)`, of what travelled as it is in their place."""
        copy_all_(list(self.exact), list(torch.split_with_sizes(flat, [len(own) for own in self.exact])))


class Round:
    """A bucket on its way."""

    def advance(self) -> None:
        """Begin its second round of collectives, where there is one: waits for the first."""

    def finish(self) -> tuple[list[Tensor], Tensor]:
        """Wait; put the mean into the pieces; return what this rank keeps of each, and whether the mean is finite."""
        raise NotImplementedError


class ErrorFeedback(Codec):
    """A codec that remembers what it does not send.

    Args:
        min_size: tensors of fewer numbers are sent as they are.
        warmup_steps: in so many steps of a training everything is sent as it is.
        exact: parameters that are sent as they are, as `--comm.compression-exact` names them.
    """

    is_elementwise = False
    has_exact_tail = True
    is_approximate = True
    gains_by_parts = False

    def __init__(self, min_size: int = MIN_SIZE, warmup_steps: int = 0, exact: str = AUTO) -> None:
        self.min_size = min_size
        self.warmup_steps = warmup_steps
        self.exact = exact
        self._exact_names: frozenset[str] = frozenset()
        self.errors = Memory()
        self._steps = 0
        """Settled ones, skipped ones among them."""
        self._is_open = False
        """Something was sent since the last step was settled."""
        self._tensors: dict[str, Sequence[tuple[str, torch.Size]]] = {}
        self._under_way: dict[str, Round] = {}
        self._fresh: dict[str, tuple[Sequence[Piece], list[Tensor], Tensor]] = {}
        self._owed: dict[str, Sequence[Piece]] = {}
        """What is sent as it is now, and was not when something of it was remembered."""

    @abstractmethod
    def begin(self, world: World, name: str, parts: Parts) -> Round:
        """Put a bucket on the wire, in collectives whose names begin with `name`. Collective."""

    def advance(self, world: World, rounds: Mapping[str, Round]) -> None:
        """Begin the second rounds of buckets, by name, that have not. Collective.

        They come in the order in which this rank has sent them, which may be another one on another rank.
        """
        for name in sorted(rounds):
            rounds[name].advance()

    def compresses(self, shape: torch.Size) -> bool:
        """Return whether a tensor of this shape is compressed."""
        return shape.numel() >= self.min_size

    def meet(self, model: nn.Module) -> None:
        """Find out which parameters are sent as they are."""
        self.spare(exact_names(model, self.name, self.exact))

    def spare(self, names: Collection[str]) -> None:
        """Send these as they are."""
        self._exact_names = frozenset(names)

    def is_exact(self, name: str) -> bool:
        """Return whether it was named, or belongs to a vocabulary and the format spares those."""
        return name in self._exact_names

    def keep_more(self, piece: Piece, is_good: bool | Tensor) -> None:
        """Keep what else belongs to a piece whose mean is there."""

    def buffer_type(self, dtype: torch.dtype) -> torch.dtype:
        """Return fp32, or fp64 for fp64: sums are taken in it."""
        return torch.float64 if dtype == torch.float64 else torch.float32

    def tolerance(self, dtype: torch.dtype) -> float:
        """Return what the mean and what all ranks remember may differ by from the exact mean, as their sum."""
        return _EXACT.tolerance(dtype)

    def lay_out(self, name: str, tensors: Sequence[tuple[str, torch.Size]]) -> None:
        """Note the tensors of a bucket."""
        self._tensors[name] = tuple(tensors)

    def start(self, world: World, prefix: str, name: str, part: Tensor) -> Callable[[], Tensor]:
        """Send what is compressed and what is not; everything as it is while the training warms up."""
        self._is_open = True
        if self._steps < self.warmup_steps:
            return world.start_all_reduce_(part, "sum", f"{prefix}.{name}")
        parts = self._parts(name, part)
        owed = self._owed[name] = [
            piece for piece in parts.spared if self.errors.get(piece.name, piece.whole) is not None
        ]
        for piece in (*parts.pieces, *owed):
            error = self.errors.get(piece.name, piece.whole)
            if error is not None:
                piece.whole.add_(error)
        self._under_way[name] = self.begin(world, f"{prefix}.{name}", parts)

        def finish() -> Tensor:
            # The second rounds of all buckets leave together: their latencies would add up one after the other.
            self.advance(world, self._under_way)
            kept, is_finite = self._under_way.pop(name).finish()
            self._fresh[name] = parts.pieces, kept, is_finite
            return part

        return finish

    def _parts(self, name: str, part: Tensor) -> Parts:
        tensors = self._tensors.get(name, [(name, part.shape)])
        lengths = [shape.numel() for _, shape in tensors]
        *views, tail = torch.split_with_sizes(part, [*lengths, len(part) - sum(lengths)])
        pieces, exact, spared = [], [], []
        for place, ((tensor, shape), view) in enumerate(zip(tensors, views, strict=True)):
            if self.compresses(shape) and not self.is_exact(tensor):
                pieces.append(Piece(tensor, place, view.view(shape)))
            else:
                exact.append(view)
                spared.append(Piece(tensor, place, view.view(shape)))
        return Parts(pieces, [*exact, tail], spared)

    def received(self, name: str, users: Tensor | None) -> None:
        """Remember what was not sent of the tensors that are used, if the mean is finite."""
        if name not in self._fresh:  # it was sent as it is
            return
        for piece in self._owed.pop(name):
            self.errors.put(piece.name, torch.zeros_like(piece.whole), users is None or users[piece.place] > 0)
        pieces, kept, is_finite = self._fresh.pop(name)
        answers = is_finite.expand(1) if users is None else is_finite & (users > 0)
        # A GPU would have to be waited for.
        good: Sequence[bool | Tensor] = answers.tolist() if answers.device.type == "cpu" else answers.unbind()
        for piece, error in zip(pieces, kept, strict=True):
            is_good = good[0 if users is None else piece.place]
            self.errors.put(piece.name, error, is_good)
            self.keep_more(piece, is_good)

    def settle(self, skipped: bool | Tensor) -> None:
        """End a step in which something was sent."""
        if self._is_open:
            self.errors.settle(skipped)
            self._steps += 1
            self._is_open = False

    def left_over(self) -> Mapping[str, Tensor]:
        """Return what this rank remembers, by tensor."""
        return self.errors.now()

    def state_dict(self) -> dict[str, Any]:
        """Return what this rank remembers, and how many steps there were; nothing before the first one."""
        steps = self._steps + self._is_open
        return {"steps": steps, "errors": self.errors.state_dict()} if steps else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from it."""
        self._steps, self._is_open = state.get("steps", 0), False
        self.errors.load_state_dict(state.get("errors", {}))

    def merged(self, states: Sequence[Mapping[str, Any]], size: int) -> dict[str, Any] | None:
        """Share out what the ranks of another number remember, so that its sum stays what it was."""
        some = [state for state in states if state]
        if not some:
            return None
        return {**some[0], "errors": merged((state["errors"] for state in some), size)}

    def kept_bytes(self, shape: torch.Size, dtype: torch.dtype) -> int:
        """Return the buffer, and what is remembered, before and after a step that is not settled."""
        return 3 * shape.numel() * self.buffer_type(dtype).itemsize if self.compresses(shape) else 0

    def about(self, tensors: Sequence[tuple[str, torch.Size]], each: str = "step") -> str:
        """Say how much is compressed, from when on, to how many bytes, and what is spared by its name."""
        spared = [shape for name, shape in tensors if self.is_exact(name) and self.compresses(shape)]
        small = [shape.numel() for name, shape in tensors if self.is_exact(name) or not self.compresses(shape)]
        share = 1 - sum(small) / max(1, sum(shape.numel() for _, shape in tensors))
        warmup = f", from {each} {self.warmup_steps + 1:,} on" if self.warmup_steps else ""
        what = f"{len(tensors) - len(small)} of {len(tensors)} tensors, {share:.1%} of the numbers"
        own = sum(self.bytes_of(name, shape, torch.float32) for name, shape in tensors)
        whole = sum(_EXACT.tensor_bytes(shape, torch.float32) for _, shape in tensors)
        line = (
            f"wire:       {self.name} for {what}{warmup}: {in_units(own)} instead of {in_units(whole)} in each {each}"
        )
        if not spared:
            return line
        bytes_spared = in_units(sum(_EXACT.tensor_bytes(shape, torch.float32) for shape in spared))
        why = "of embeddings and the output layer, not compressed" if self.exact == AUTO else "not compressed"
        return f"{line}, {bytes_spared} of it {why} (--comm.compression-exact {self.exact})"


def flat(tensors: Sequence[Tensor], like: Tensor) -> Tensor:
    """Return tensors of one type as one, `(n,)`; an empty one like `like` where there are none."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors]) if tensors else like.new_zeros(0)
