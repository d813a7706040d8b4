"""A parameter's gradient: whether it was changed, whether another may take its place, and its way into the buffer.

Backward writes a gradient of its own for each parameter, and the buffer that is sent holds it a second time: 4 of 20
bytes a parameter, with AdamW in fp32. So where there is little memory, on GPUs, gradients move into the buffer as soon
as all of it is there, and those of backward are freed: at most about one bucket of them lives at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from hvdtrain.models.private_tensors import is_held_by_others, version_of
from hvdtrain.models.private_torch import copy_all_
from hvdtrain.world.filling import lies_densely, real

Mark = tuple[Tensor, int]
"""A gradient as it was: the tensor, and how often it had been changed in place."""


def mark_of(gradient: Tensor) -> Mark:
    """Return what `has_changed` asks for."""
    return gradient, version_of(gradient)


def has_changed(gradient: Tensor, mark: Mark) -> bool:
    """Return whether a gradient was replaced, or changed in place, since it was marked."""
    return gradient is not mark[0] or version_of(gradient) != mark[1]


class Memory:
    """Tells whether gradients have their memory to themselves, or with gradients of other parameters alone.

    What a product of joined weights has for a gradient is one tensor, of which each parameter's `.grad` is a part.

    Args:
        parameters: returns those whose gradients may lie together; they are looked at once, and where it matters.
    """

    def __init__(self, parameters: Callable[[], Iterable[nn.Parameter]]) -> None:
        self._parameters = parameters
        self._counts: Counter[int] | None = None

    def can_be_replaced(self, parameter: nn.Parameter) -> bool:
        """Return whether another tensor may become the gradient: a user's list or flat buffer must see the mean."""
        if parameter.grad is None:
            return True
        if not parameter.grad.is_contiguous() and not _lies_as(parameter):
            return False
        if not is_held_by_others(parameter):
            return True
        place = parameter.grad.untyped_storage().data_ptr()
        if self._counts is None:
            there = (other.grad for other in self._parameters())
            dense = (own for own in there if own is not None and own.layout == torch.strided)
            self._counts = Counter(own.untyped_storage().data_ptr() for own in dense)
        together = self._counts[place]
        return together > 1 and not is_held_by_others(parameter, together)


def _lies_as(parameter: nn.Parameter) -> bool:
    """Return whether a gradient has no gaps and lies in memory as its parameter does, such as channels-last."""
    gradient = parameter.grad
    return gradient is not None and gradient.stride() == parameter.stride() and lies_densely(gradient)


def waiting(parameters: Sequence[nn.Parameter], views: Sequence[Tensor]) -> list[int]:
    """Return the places of the parameters whose gradients are not in their part of the buffer, and could be.

    Args:
        parameters: of a bucket.
        views: the parts, of the gradients' own type.
    """
    return [
        place
        for place, (parameter, view) in enumerate(zip(parameters, views, strict=True))
        if parameter.grad is not None and _could_move(parameter.grad) and parameter.grad.data_ptr() != view.data_ptr()
    ]


def _could_move(gradient: Tensor) -> bool:
    """Return whether a gradient is of numbers alone: not of rows, nor one that is differentiated again."""
    return gradient.layout == torch.strided and not gradient.requires_grad


@torch.no_grad()
def move(parameters: Sequence[nn.Parameter], views: Sequence[Tensor], places: Sequence[int], memory: Memory) -> bool:
    """Copy gradients into their parts of the buffer, and make these the gradients; returns whether one is left.

    Left is what something else holds, which must go on to see what becomes of it.
    """
    free = [place for place in places if memory.can_be_replaced(parameters[place])]
    if free:
        sources = [real(_gradient(parameters[place]).detach()) for place in free]
        copy_all_([views[place] for place in free], sources)
        del sources
    for place in free:
        parameters[place].grad = _as_gradient(parameters[place], views[place])
    return len(free) < len(places)


def let_go(
    parameters: Sequence[nn.Parameter],
    views: Sequence[Tensor],
    marks: list[Mark | None],
    places: Sequence[int],
    memory: Memory,
) -> bool:
    """Do the same where the buffer has the numbers already, and is on the wire; what was changed stays, to be seen."""
    left = False
    for place in places:
        parameter, mark = parameters[place], marks[place]
        if mark is None or has_changed(_gradient(parameter), mark):
            left = True
            continue
        marks[place] = mark = None  # which holds it
        if memory.can_be_replaced(parameter):
            parameter.grad = _as_gradient(parameter, views[place])
        else:
            left = True
        marks[place] = mark_of(_gradient(parameter))
    return left


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _as_gradient(parameter: nn.Parameter, view: Tensor) -> Tensor:
    """Return a part of the buffer as a tensor that counts its own changes, and not those of the other parts."""
    return (torch.view_as_complex(view) if parameter.is_complex() else view).data
