"""A parameter's gradient: whether it was changed, whether another may take its place, and its way into the buffer.

Backward writes a gradient of its own for each parameter, and the buffer that is sent holds it a second time: 4 of 20
bytes a parameter, with AdamW in fp32. So where there is little memory, on GPUs, gradients move into the buffer as soon
as all of it is there, and those of backward are freed: at most about one bucket of them lives at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hvdtrain.models.private_torch import copy_all_, is_held_by_others, version_of
from hvdtrain.world.filling import real

Mark = tuple[Tensor, int]
"""A gradient as it was: the tensor, and how often it had been changed in place."""


def mark_of(gradient: Tensor) -> Mark:
    """Return what `has_changed` asks for."""
    return gradient, version_of(gradient)


def has_changed(gradient: Tensor, mark: Mark) -> bool:
    """Return whether a gradient was replaced, or changed in place, since it was marked."""
    return gradient is not mark[0] or version_of(gradient) != mark[1]


def can_be_replaced(parameter: nn.Parameter) -> bool:
    """Return whether another tensor may become the gradient: a user's list or flat buffer must see the mean."""
    return parameter.grad is None or (parameter.grad.is_contiguous() and not is_held_by_others(parameter))


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
def move(parameters: Sequence[nn.Parameter], views: Sequence[Tensor], places: Sequence[int]) -> bool:
    """Copy gradients into their parts of the buffer, and make these the gradients; returns whether one is left.

    Left is what something else holds, which must go on to see what becomes of it.
    """
    free = [place for place in places if can_be_replaced(parameters[place])]
    if free:
        sources = [real(_gradient(parameters[place]).detach()) for place in free]
        copy_all_([views[place] for place in free], sources)
        del sources
    for place in free:
        parameters[place].grad = _as_gradient(parameters[place], views[place])
    return len(free) < len(places)


def let_go(
    parameters: Sequence[nn.Parameter], views: Sequence[Tensor], marks: list[Mark | None], places: Sequence[int]
) -> bool:
    """Do the same where the buffer has the numbers already, and is on the wire; what was changed stays, to be seen."""
    left = False
    for place in places:
        parameter, mark = parameters[place], marks[place]
        if mark is None or has_changed(_gradient(parameter), mark):
            left = True
            continue
        marks[place] = mark = None  # which holds it
        if can_be_replaced(parameter):
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
