"""Whether a function of a user's takes the arguments that it will be given: found before a run begins."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


def misfit(function: Callable[..., Any], count: int) -> str:
    """Return how a function is written that cannot be called with so many arguments; "" where it can, or nobody knows.

    Functions of libraries in C do not always say what they take.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return ""
    try:
        signature.bind(*[None] * count)
    except TypeError:
        name = getattr(function, "__name__", type(function).__name__)
        return f"{name}{signature.replace(return_annotation=inspect.Signature.empty)}"
    return ""
