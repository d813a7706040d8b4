"""Generators of random numbers that a data set keeps for itself: `numpy.random.default_rng()`, those of albumentations.

Whoever seeds torch, numpy and Python does not reach them: what they draw would depend on which samples a process has
read before, and so on the number of ranks and workers.
"""

from __future__ import annotations

import functools
import random
import sys
import sysconfig
import types
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

Generator = np.random.Generator | np.random.RandomState | random.Random | torch.Generator

_KINDS = (np.random.Generator, np.random.RandomState, random.Random, torch.Generator)
_LEAVES = (str, bytes, int, float, complex, type(None), torch.Tensor, np.ndarray, type, types.ModuleType)
_INSTALLED = (Path(__file__).parents[1], *(Path(sysconfig.get_path(n)) for n in ("stdlib", "purelib", "platlib")))
# Of long lists, such as paths of files, the first entries tell what they hold.
_MOST_OBJECTS, _MOST_ENTRIES = 20_000, 256


def generators_in(data: Any) -> tuple[Generator, ...]:
    """Return the generators that a data set, its transforms or what these refer to hold, in a fixed order."""
    found: list[Generator] = []
    seen: dict[int, Any] = {}
    todo: deque[Any] = deque([data])
    while todo and len(seen) < _MOST_OBJECTS:
        item = todo.popleft()
        if isinstance(item, _LEAVES) or id(item) in seen:
            continue
        seen[id(item)] = item  # kept alive, or another object might have its id
        if isinstance(item, _KINDS):
            found.append(item)
        else:
            todo.extend(_within(item))
    return tuple(found)


def seed_all(generators: Sequence[Generator], seed: int) -> None:
    """Seed each generator, from `seed`, 63 bits, and its place: two of them draw different numbers."""
    for place, generator in enumerate(generators):
        own = (seed + place * 0x9E3779B97F4A7C15) % 2**63
        if isinstance(generator, np.random.Generator):
            kind: Any = type(generator.bit_generator)
            generator.bit_generator.state = kind(own).state
        elif isinstance(generator, torch.Generator):
            generator.manual_seed(own)
        else:
            generator.seed(own % 2**32)


def states_of(generators: Sequence[Generator]) -> list[str]:
    """Return what changes when one of the generators draws."""
    return [_state_of(generator) for generator in generators]


def _state_of(generator: Generator) -> str:
    if isinstance(generator, np.random.Generator):
        return str(generator.bit_generator.state)
    if isinstance(generator, torch.Generator):
        return str(generator.get_state().tolist())
    if isinstance(generator, random.SystemRandom):  # which has none
        return ""
    state = generator.getstate() if isinstance(generator, random.Random) else generator.get_state(legacy=False)
    return str(state)


def _within(item: Any) -> Iterator[Any]:
    """Yield what an object refers to, without running any code of its class."""
    if isinstance(item, (list, tuple, set, frozenset, deque)):
        yield from islice(item, _MOST_ENTRIES)
    elif isinstance(item, dict):
        yield from islice(item.values(), _MOST_ENTRIES)
    elif isinstance(item, functools.partial):
        yield from (item.func, item.args, item.keywords)
    elif isinstance(item, types.MethodType):
        yield from (item.__self__, item.__func__)
    elif isinstance(item, types.FunctionType):
        yield from _used_by(item)
        return
    if hasattr(item, "__dict__"):
        yield from list(vars(item).values())
    for kind in type(item).__mro__:
        for name in _slots_of(kind):
            yield getattr(item, name, None)
        if not _is_installed(kind.__module__):
            yield from list(vars(kind).values())


def _used_by(function: types.FunctionType) -> Iterator[Any]:
    """Yield what a function has besides its arguments: closures, defaults, and of a user's file what it names there."""
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not there yet
            continue
    yield function.__defaults__
    yield function.__kwdefaults__
    if not _is_installed(function.__module__):
        yield from (function.__globals__.get(name) for name in _names_in(function.__code__))


def _names_in(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _names_in(inner)


def _slots_of(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


@functools.cache
def _is_installed(module: str) -> bool:
    """Tell whether a module is Python's, a library's or hvdtrain's own: no file of a user."""
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None:
        return module not in ("__main__", "__mp_main__")
    return any(Path(file).is_relative_to(folder) for folder in _INSTALLED)
