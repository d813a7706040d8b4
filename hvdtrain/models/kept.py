"""What a forward pass may change besides its result, kept and put back: buffers, frozen weights, extra state.

A pass that is only tried, or that is computed once more, must leave a model as it was: else running statistics count a
batch twice, and a slow copy of the weights (arXiv:1911.05722) has moved twice.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from hvdtrain.models.private_modules import is_saved_buffer
from hvdtrain.models.private_torch import copy_all_

BufferPlace = tuple[nn.Module, str]
"""A module and the name that one of its buffers has there."""


def buffer_places(model: nn.Module, is_saved: bool = False) -> list[BufferPlace]:
    """Return where a model has its buffers, of which only those that are part of its state, if asked for.

    One that a module has by two names has two places.
    """
    return [
        (module, name)
        for module in model.modules()
        for name, _ in module.named_buffers(recurse=False, remove_duplicate=False)
        if not is_saved or is_saved_buffer(module, name)
    ]


class KeptBuffers:
    """Buffers as they were, whether a pass writes into them or puts others in their place.

    Args:
        places: where they are.
    """

    def __init__(self, places: Iterable[BufferPlace]) -> None:
        self._places = [*places]
        self._buffers: list[tuple[nn.Module, str, Tensor, Tensor | None]] = []
        self.take()

    def take(self) -> None:
        """Keep them as they are now; into the memory of before, where it fits."""
        if self._places:
            self._take()

    @torch.no_grad()
    def _take(self) -> None:
        there = [(module, name, getattr(module, name)) for module, name in self._places]
        now = [place for place in there if isinstance(place[2], Tensor)]
        if self._buffers and len(now) == len(self._buffers) and all(map(_is_like, self._buffers, now)):
            copy_all_([before for *_, before in self._buffers if before is not None], [place[2] for place in now])
            self._buffers = [(*place, entry[3]) for place, entry in zip(now, self._buffers, strict=True)]
        else:
            self._buffers = [(*place, _copy_of(place[2])) for place in now]

    def changed(self) -> list[BufferPlace]:
        """Return where there are others now, or other numbers."""
        return [
            (module, name)
            for module, name, buffer, before in self._buffers
            if getattr(module, name) is not buffer or not _are_equal(buffer, before)
        ]

    @torch.no_grad()
    def put_back(self) -> None:
        """Have them again, with their numbers; what has come up since then stays."""
        for module, name, buffer, before in self._buffers:
            if getattr(module, name) is not buffer:
                setattr(module, name, buffer)
            if before is not None and not _are_equal(buffer, before):
                buffer.copy_(before)


class KeptState:
    """A model's buffers, extra state and frozen weights as they were.

    Weights are frozen that a forward pass moves by itself, such as those of a teacher; of a large model from which only
    a small part learns they would take too much memory, and it has no teacher of its own.
    """

    def __init__(self, model: nn.Module) -> None:
        self._buffers = KeptBuffers(buffer_places(model))
        self._weights = [(weight, weight.detach().clone()) for weight in _frozen_by_a_pass([*model.parameters()])]
        own = (module for module in model.modules() if type(module).get_extra_state is not nn.Module.get_extra_state)
        self._extra = [(module, copy.deepcopy(module.get_extra_state())) for module in own]

    @torch.no_grad()
    def put_back(self) -> None:
        """Have all as it was."""
        self._buffers.put_back()
        for weight, before in self._weights:
            if not torch.equal(weight, before):
                weight.copy_(before)
        for module, state in self._extra:
            module.set_extra_state(state)


def _frozen_by_a_pass(parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    learning = sum(parameter.nbytes for parameter in parameters if parameter.requires_grad)
    return frozen if sum(parameter.nbytes for parameter in frozen) <= learning else []


def _copy_of(buffer: Tensor) -> Tensor | None:
    """Return a copy; None of a kind that is not written into, number by number."""
    return buffer.detach().clone() if buffer.layout == torch.strided else None


def _is_like(entry: tuple[nn.Module, str, Tensor, Tensor | None], place: tuple[nn.Module, str, Tensor]) -> bool:
    """Return whether a buffer fits into the memory of the copy that was made in its place."""
    (module, name, _, before), (own, own_name, buffer) = entry, place
    if module is not own or name != own_name or before is None:
        return False
    return before.shape == buffer.shape and before.dtype == buffer.dtype and before.device == buffer.device


def _are_equal(buffer: Tensor, before: Tensor | None) -> bool:
    return before is None or torch.equal(buffer, before)
