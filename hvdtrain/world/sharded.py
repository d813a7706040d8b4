"""An optimizer whose state is spread over the ranks: each keeps, and moves, its own part of the parameters (ZeRO-1).

A step of `shard=True` (arXiv:1910.02054, section 5): gradients are summed on the rank that keeps their part, each
rank's optimizer moves its pieces of the parameters, and the pieces are gathered on all ranks. The optimizer's
parameter groups meanwhile hold the pieces instead of the model's parameters: clipping, a loss scaler, a schedule and
the optimizer itself go on as they are, on fewer numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hvdtrain.errors import ConfigError
from hvdtrain.models.private_torch import copy_all_
from hvdtrain.models.walk import owned_by
from hvdtrain.optim.divisible import Division, divisions
from hvdtrain.world.carriers import bits_of
from hvdtrain.world.codec import Codec
from hvdtrain.world.filling import like, real
from hvdtrain.world.layout import Layout
from hvdtrain.world.pieces import Cut, Piece, cut_for, is_divisible, numbers_in
from hvdtrain.world.sharded_buckets import IN_FLIGHT, ShardedLayout
from hvdtrain.world.sharded_state import State, part_of, whole_of

if TYPE_CHECKING:
    from hvdtrain.world.averaging import Averaging
    from hvdtrain.world.world import World


def check_sharding(op: str, codec: Codec) -> None:
    """Make sure that gradients which are combined and travel so can be summed in parts.

    Raises:
        ConfigError: they cannot.
    """
    if op == "adasum":
        raise ConfigError(
            "--optim.shard leaves each rank a part of the mean, and --comm.op adasum needs whole gradients: leave out"
            " one of them"
        )
    if not codec.is_elementwise or type(codec).start is not Codec.start:
        raise ConfigError(
            f"--optim.shard sums gradients in parts, and --comm.compression {codec.name} does not send them as one sum:"
            " leave one of them out, or use --comm.compression fp16"
        )


class Sharding:
    """Which rank keeps what of an optimizer, and how it is put together again.

    Args:
        world: the ranks.
        optimizer: the user's own; its groups hold this rank's pieces from now on.
        names: of the model's parameters.
        averaging: how gradients are averaged.
        sparse: parameters whose gradients are sparse.

    Raises:
        ConfigError: it cannot be divided, or its gradients cannot be summed in parts.
    """

    def __init__(
        self,
        world: World,
        optimizer: torch.optim.Optimizer,
        names: dict[nn.Parameter, str],
        averaging: Averaging,
        sparse: set[nn.Parameter],
    ) -> None:
        check_sharding(averaging.op, averaging.codec())
        if sparse:
            raise ConfigError("--optim.shard needs dense gradients: leave it out, or sparse embeddings")
        self._world = world
        self._names = names
        self._averaging = averaging
        self._prefix = "sharded"
        self._taking_part: Callable[[], set[int]] = set
        self._may_move: set[int] = set()
        """Places of the cuts for which a rank may have a gradient since these were last cleared: alike on all ranks."""
        self.parameters = owned_by(optimizer)
        """The model's, in the order of the optimizer's groups: in which its state numbers them."""
        order = {parameter: place for place, parameter in enumerate(names)}
        division = division_of(optimizer)
        ordered = sorted(self.parameters, key=lambda parameter: order.get(parameter, len(order)))
        self.cuts: list[Cut] = cut_for(world.size, ordered, division, averaging.bucket_bytes)
        self._pieces = [[Piece(part, offset) for part, offset in cut.parts(world.rank)] for cut in self.cuts]
        self._group_sizes = [len(group["params"]) for group in optimizer.param_groups]
        self.is_whole = {p: not is_divisible(p, division[p]) for p in self.parameters}
        self._take_over(optimizer)

    @property
    def pieces(self) -> list[Piece]:
        """Return this rank's, in the order of the buckets."""
        return [piece for own in self._pieces for piece in own]

    def layout(self, prefix: str, codec: Codec) -> Layout:
        """Return the buckets in which the gradients travel."""
        self._prefix = prefix
        layout = ShardedLayout(self._world, prefix, self._names, self._averaging, codec, self.cuts, self._pieces)
        self._taking_part = layout.taking_part
        return layout

    def _take_over(self, optimizer: torch.optim.Optimizer) -> None:
        """Put the pieces where the parameters were, with their part of what state there is."""
        piece_of = {piece.part.parameter: piece for piece in self.pieces}
        before = dict(optimizer.state)
        for parameter in self.parameters:
            optimizer.state.pop(parameter, None)
        for group in optimizer.param_groups:
            group.pop("param_names", None)  # of the whole; hvdtrain names parameters by the model
            group["params"] = [piece_of[p].moved for p in group["params"] if p in piece_of]
        for parameter, piece in piece_of.items():
            if parameter in before:
                entries = before[parameter].items()
                optimizer.state[piece.moved] = {key: part_of(piece.part, value) for key, value in entries}

    @torch.no_grad()
    def gather(self) -> None:
        """Give every rank what the others have moved, after a step. Collective."""
        for piece in self.pieces:
            piece.is_used = True
        learning = {i for i, cut in enumerate(self.cuts) if any(p.requires_grad for p in cut.parameters)}
        self._may_move |= self._taking_part()
        active = sorted(learning | self._may_move)  # the optimizer also moves what was frozen since it got a gradient
        waits: list[Any] = []
        for place in range(len(active) + IN_FLIGHT):
            if place < len(active):
                i = active[place]
                own = _row([piece.moved for piece in self._pieces[i]], self.cuts[i])
                name = self._names.get(self.cuts[i].parameters[0], str(i))
                waits.append(self._world.start_all_gather(own, f"{self._prefix}.moved.{name}"))
            if place >= IN_FLIGHT:
                _spread(waits[place - IN_FLIGHT](), self.cuts[active[place - IN_FLIGHT]])
                waits[place - IN_FLIGHT] = None

    def drop_gradients(self) -> None:
        """Note that the pieces' gradients were set to None, on all ranks."""
        self._may_move.clear()

    def gradients(self) -> dict[nn.Parameter, Tensor]:
        """Return the whole gradients that the pieces have now; zeros where there is none. Collective."""
        found: dict[nn.Parameter, Tensor] = {}
        for i, cut in enumerate(self.cuts):
            own = [p.moved.grad if p.moved.grad is not None else torch.zeros_like(p.moved) for p in self._pieces[i]]
            whole = [torch.empty_like(parameter) for parameter in cut.parameters]
            bits = self._world.start_all_gather(_row(own, cut), f"{self._prefix}.whole.{i}")()
            _spread(bits, cut, whole)
            found.update(zip(cut.parameters, whole, strict=True))
        return found

    def whole_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Return on rank 0 what the `state_dict()` of the undivided optimizer would be, in host memory. Collective.

        It is gathered bucket by bucket. Other ranks get an empty dictionary.
        """
        numbers = self._numbers
        own = {numbers[piece.part.parameter]: dict(optimizer.state.get(piece.moved, {})) for piece in self.pieces}
        state = whole_of(self._world, self.cuts, numbers, own)
        if self._world.rank:
            return {}
        outline = self.outline(optimizer)
        return {"state": {**state, **outline["state"]}, "param_groups": outline["param_groups"]}

    def outline(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Return the undivided `state_dict()` without the states of parameters, and the forms of these.

        `rundir.joined` puts it and the `own_pieces` of all ranks together.
        """
        groups, start = [], 0
        for group, size in zip(optimizer.param_groups, self._group_sizes, strict=True):
            groups.append({**group, "params": list(range(start, start + size))})
            start += size
        others = {key: value for key, value in optimizer.state.items() if not isinstance(key, Tensor)}
        forms = {number: (tuple(p.shape), p.stride()) for number, p in enumerate(self.parameters)}
        return {"state": others, "param_groups": groups, "forms": forms}

    def own_pieces(self, optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Any]]:
        """Return this rank's piece of each parameter, by its number: from where to where, and its state's entries."""
        numbers = self._numbers
        return {
            numbers[piece.part.parameter]: {
                "start": piece.part.start,
                "end": piece.part.end,
                "is_whole": piece.part.is_whole,
                "entries": dict(optimizer.state.get(piece.moved, {})),
            }
            for piece in self.pieces
        }

    @property
    def _numbers(self) -> dict[nn.Parameter, int]:
        return {parameter: number for number, parameter in enumerate(self.parameters)}

    def part_of_state(self, optimizer: torch.optim.Optimizer, whole: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return what `load_state_dict` takes on this rank of the whole state that rank 0 has. Collective.

        It is sent parameter by parameter. A state of another number of parameters becomes one that torch refuses.
        """
        return State(self._world, whole).part(self.parameters, self._pieces_in_order(optimizer), self._group_sizes)

    def _pieces_in_order(self, optimizer: torch.optim.Optimizer) -> list[list[Piece]]:
        """Return this rank's pieces of each group, as they stand there."""
        of = {piece.moved: piece for piece in self.pieces}
        return [[of[moved] for moved in group["params"]] for group in optimizer.param_groups]


def division_of(optimizer: torch.optim.Optimizer) -> dict[nn.Parameter, Division]:
    """Return how far each of an optimizer's parameters can be divided.

    Raises:
        ConfigError: not at all.
    """
    found = divisions(optimizer)
    if "none" in found:
        raise ConfigError(
            f"--optim.shard cannot divide {type(optimizer).__name__}: a parameter's step there depends on other"
            " parameters, on random numbers, or cannot be tried out. Leave --optim.shard out, or use adamw"
        )
    groups = zip(optimizer.param_groups, found, strict=True)
    return {parameter: division for group, division in groups for parameter in group["params"]}


def _row(tensors: Sequence[Tensor], cut: Cut) -> Tensor:
    """Return the bits of this rank's part of a bucket, flat, of a type that every back end carries."""
    first = real(cut.parameters[0].detach())
    parts = [real(tensor.detach()).reshape(-1) for tensor in tensors]
    return bits_of(torch.cat(parts) if parts else first.new_zeros(0), "a part of the parameters")[0]


def _spread(bits: Tensor, cut: Cut, targets: Sequence[Tensor] | None = None) -> None:
    """Write the ranks' parts of a bucket, gathered, into its parameters, or into tensors like them."""
    numbers, offset = bits.view(real(cut.parameters[0].detach()).dtype), 0
    to = [real(target.detach()) for target in targets or cut.parameters]
    found = []
    for parameter, target in zip(cut.parameters, to, strict=True):
        own = numbers[offset : offset + numbers_in(parameter)]
        offset += len(own)
        found.append(own.view(target.shape) if cut.is_whole else like(own, parameter))
    copy_all_(to, found)
