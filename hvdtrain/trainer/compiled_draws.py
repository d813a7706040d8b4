"""How a compiled model draws numbers for samples: an opaque operator gives the keys, the rest is compiled with it.

The keys of a draw depend on how many there were before, which is counted in Python, and on torch's own generator: a
compiler that came upon that would cut the model in pieces there, two a draw. All else is arithmetic of single elements,
which it joins with what it is drawn for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hvdtrain.models.private_torch import function_modes, functionalized_calls

if TYPE_CHECKING:
    from hvdtrain.trainer.randomness import SampleRandomness


class _Left(threading.local):
    """The mode that answers a call at this time: it is off inside of what it answers."""

    mode: SampleRandomness | None = None


_left = _Left()


@torch.library.custom_op("hvdtrain::sample_keys", mutates_args=("draws",))
def _sample_keys(positions: Tensor, draws: Tensor, device: torch.device) -> Tensor:
    """Return the keys of the next draw of the mode that is entered, int64 `(n,)`.

    Args:
        positions: int64 `(n,)`, of the samples.
        draws: only that it is changed tells a compiler that one call is not another.
        device: of the keys.
    """
    mode = _left.mode or next((mode for mode in reversed(function_modes()) if hasattr(mode, "next_keys")), None)
    if mode is None:
        raise RuntimeError("what was compiled to draw numbers for samples was called outside of a micro-batch")
    keys: Tensor = mode.next_keys(device)
    return keys


@_sample_keys.register_fake
def _(positions: Tensor, draws: Tensor, device: torch.device) -> Tensor:
    return torch.empty_like(positions, device=device)


def compiled_keys(positions: Tensor, draws: Tensor, device: torch.device) -> Tensor:
    """Have what is compiled call the operator."""
    keys: Tensor = torch.ops.hvdtrain.sample_keys.default(positions, draws, device)
    return keys


def _answer(mode: SampleRandomness, positions: Tensor, draws: Tensor, device: torch.device) -> Tensor:
    """A call of the operator is itself one that the mode sees."""
    return mode.next_keys(device)


def _passing_on(function: Any) -> Callable[..., Any]:
    """Return an answer that calls a function as it is, and lets the operator within find the mode."""

    def call(mode: SampleRandomness, *args: Any, **kwargs: Any) -> Any:
        before, _left.mode = _left.mode, mode
        try:
            return function(*args, **kwargs)
        finally:
            _left.mode = before

    return call


OPERATORS: dict[Any, Callable[..., Any]] = {
    torch.ops.hvdtrain.sample_keys.default: _answer,
    **{call: _passing_on(call) for call in functionalized_calls()},
}
