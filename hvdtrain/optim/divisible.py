"""How far an optimizer can be divided: by elements, by whole parameters, or not at all. Found by trying it.

Copies of the optimizer take a few steps on small stand-ins for its parameters: whole, with a part of the parameters
only, and with each parameter cut into flat pieces. What each of them moves must be what the whole moves. So a class is
known by what it does, and one of the user's own needs no entry in any list.
"""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

Division = Literal["elements", "parameters", "none"]
"""elements: each number by itself, as Adam moves them. parameters: each parameter by itself, as LARS and Muon do."""

# Longest side of a stand-in: an optimizer may treat small matrices otherwise, as Adafactor's of other libraries keep
# the squares of one with a side below 128 as they are, and 8-bit states begin at 4096 numbers.
_SIDE = 160
_MOST_ELEMENTS = _SIDE**2
_STEPS = 2
# Kernels may add in another order; what looks at other elements differs by far more.
_TOLERANCE = 1e-9


def divisions(optimizer: torch.optim.Optimizer) -> list[Division]:
    """Return for each parameter group of an optimizer without state how far it can be divided.

    All are "none" where a parameter's step depends on other parameters, where two equal steps differ (noise), or where
    the optimizer cannot be copied and tried.
    """
    groups = [_stand_ins(group["params"]) for group in optimizer.param_groups]
    try:
        whole, again = (_moved(optimizer, groups, _whole) for _ in range(2))
        apart = [_moved(optimizer, groups, partial(_one_of_two, part=k)) for k in range(2)]
    except Exception:  # of any type: it is a user's class, and what cannot be tried is not divided
        return ["none"] * len(groups)
    for other in (again, _joined(apart)):
        if not all(_alike(one, two) for one, two in zip(whole, other, strict=True)):
            return ["none"] * len(groups)
    return ["elements" if _is_elementwise(optimizer, groups, whole, k) else "parameters" for k in range(len(groups))]


def takes_turns(optimizer: torch.optim.Optimizer) -> bool:
    """Tell whether parameters may be stepped one after the other, by one call of `step` for each.

    What counts the calls, and not each parameter's own, cannot.
    """
    groups = [_stand_ins(group["params"]) for group in optimizer.param_groups]
    try:
        whole, again = (_moved(optimizer, groups, _whole) for _ in range(2))
        turns = _moved(optimizer, groups, _whole, in_turns=True)
    except Exception:  # as in `divisions`
        return False
    return all(_alike(one, two) for other in (again, turns) for one, two in zip(whole, other, strict=True))


Cut = Callable[[int, Tensor], list[Tensor]]
"""Returns the parts of stand-in number i that take part."""
Moved = list[list[Tensor]]
"""What the parts of each stand-in have become."""


def _whole(number: int, tensor: Tensor) -> list[Tensor]:
    return [tensor]


def _one_of_two(number: int, tensor: Tensor, part: int) -> list[Tensor]:
    return [tensor] if number % 2 == part else []


def _in_pieces(number: int, tensor: Tensor) -> list[Tensor]:
    """Return flat pieces of unequal length, cut within a row."""
    flat = tensor.view(-1)
    first = len(flat) // 3 + 1
    return [piece for piece in torch.tensor_split(flat, (first, first + len(flat) // 5)) if len(piece)]


def _is_elementwise(optimizer: Any, groups: Sequence[Sequence[Tensor]], whole: Moved, number: int) -> bool:
    """Return whether a group moves pieces as it moves the whole, with a state that can be cut as they are."""
    start = sum(map(len, groups[:number]))
    own = range(start, start + len(groups[number]))
    try:
        _moved(optimizer, groups, _whole, check_state=own)
        pieces = _moved(optimizer, groups, lambda i, t: _in_pieces(i, t) if i in own else [t], check_state=own)
    except Exception:  # Muon, for one, takes matrices only
        return False
    return all(_alike(whole[i], [torch.cat([piece.view(-1) for piece in pieces[i]])]) for i in own)


def _alike(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    pairs = zip(one, other, strict=True)
    return all(torch.allclose(a.view(-1), b.view(-1), rtol=_TOLERANCE, atol=_TOLERANCE) for a, b in pairs)


def _joined(parts: Sequence[Moved]) -> Moved:
    return [next(own for own in of_one if own) for of_one in zip(*parts, strict=True)]


def _stand_ins(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Return a small tensor of fp64 for each kind of parameter, two where there are two: one may look at the other."""
    kinds: dict[tuple[int, ...], int] = defaultdict(int)
    for parameter in parameters:
        shape, room = [], _MOST_ELEMENTS
        for length in parameter.shape:
            shape.append(max(1, min(length, _SIDE, room)))
            room //= shape[-1]
        kinds[tuple(shape)] += 1
    random = torch.Generator().manual_seed(0)
    shapes = [shape for shape, count in kinds.items() for _ in range(min(2, count))]
    return [torch.randn(shape, dtype=torch.float64, generator=random) for shape in shapes]


def _moved(
    optimizer: Any,
    groups: Sequence[Sequence[Tensor]],
    cut: Cut,
    check_state: Sequence[int] | range = (),
    in_turns: bool = False,
) -> Moved:
    """Return what a copy of the optimizer makes of stand-ins that are cut so, in a few steps.

    Raises:
        ValueError: the state of one in `check_state` has tensors of other shapes than its parts, or in lists and the
            like: nobody could tell which of its numbers belong to which of the parameter's.
    """
    tried, random = _copied(optimizer), torch.Generator().manual_seed(1)
    parts: list[list[nn.Parameter]] = []
    for group, tensors in zip(tried.param_groups, groups, strict=True):
        first = len(parts)
        for tensor in tensors:
            parts.append([nn.Parameter(part.clone()) for part in cut(len(parts), tensor)])
        group["params"] = [part for of_one in parts[first:] for part in of_one]
    everything = [tensor for tensors in groups for tensor in tensors]
    for _ in range(_STEPS):
        for number, tensor in enumerate(everything):
            gradient = torch.randn(tensor.shape, dtype=tensor.dtype, generator=random)
            for part, piece in zip(parts[number], cut(number, gradient), strict=True):
                part.grad = piece.clone()
        _take_step(tried, in_turns)
    for number in check_state:
        for part in parts[number]:
            for value in tried.state[part].values():
                if _has_another_shape(value, part):
                    raise ValueError("a state of another shape")
    return [[part.detach() for part in of_one] for of_one in parts]


def _has_another_shape(value: Any, part: Tensor) -> bool:
    """Tell whether an entry of a state is a tensor of another shape than the part's, or holds tensors itself."""
    if isinstance(value, Tensor):
        return value.dim() > 0 and value.shape != part.shape
    return _holds_tensors(value)


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        value = [*value.values()]
    is_nest = isinstance(value, Collection) and not isinstance(value, str | bytes | Tensor)
    return isinstance(value, Tensor) or (is_nest and any(map(_holds_tensors, value)))


def _take_step(tried: Any, in_turns: bool) -> None:
    """Take a step with all parameters, or one call after the other, each with one of them."""
    if not in_turns:
        tried.step()
        return
    whole = [group["params"] for group in tried.param_groups]
    for parameter in [parameter for parameters in whole for parameter in parameters]:
        for group, parameters in zip(tried.param_groups, whole, strict=True):
            group["params"] = [other for other in parameters if other is parameter]
        tried.step()
    for group, parameters in zip(tried.param_groups, whole, strict=True):
        group["params"] = parameters


def _copied(optimizer: torch.optim.Optimizer) -> Any:
    """Return a copy without parameters, state and hooks; it shares nothing that a step changes.

    `copy.deepcopy` would leave out what a class keeps besides torch's own attributes.
    """
    kind = type(optimizer)
    tried: Any = kind.__new__(kind)
    attributes = vars(optimizer)
    left_out = {"state", "param_groups"} | {name for name in attributes if name.endswith("_hooks")}
    memo: dict[int, Any] = {id(p): p for group in optimizer.param_groups for p in group["params"]}
    for name, value in attributes.items():
        if name not in left_out:
            vars(tried)[name] = copy.deepcopy(value, memo)
        elif name.endswith("_hooks"):
            vars(tried)[name] = OrderedDict()
    tried.state = defaultdict(dict)
    others = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    tried.param_groups = [{**copy.deepcopy(group, memo), "params": []} for group in others]
    return tried
