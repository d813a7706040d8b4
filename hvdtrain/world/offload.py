"""An optimizer's state in host memory: a step takes it to the parameters' device a part at a time, and back.

The step itself is computed where the parameters are, by the optimizer's own kernels: the result is bitwise what it is
without. What it costs is the way of the state to the device and back in every step, and that the host waits for it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hvdtrain.data.nested import map_tensors, tensors_in
from hvdtrain.data.pinned import PinnedMemory
from hvdtrain.errors import ConfigError
from hvdtrain.models.walk import owned_by
from hvdtrain.optim.divisible import takes_turns
from hvdtrain.optim.private_optimizer import hooked_step, without_step_hooks
from hvdtrain.world.loaded_state import laid_as

CHUNK_BYTES = 64 << 20
"""Parameters that are stepped at a time, in bytes; a larger one by itself."""


def in_chunks(sizes: Sequence[int]) -> list[range]:
    """Return which parameters are stepped together, by their sizes in bytes: neighbours, as many as fit."""
    chunks, start, total = [], 0, 0
    for place, size in enumerate(sizes):
        if place > start and total + size > CHUNK_BYTES:
            chunks.append(range(start, place))
            start, total = place, 0
        total += size
    return [*chunks, range(start, len(sizes))] if sizes else []


def check_turns(optimizer: torch.optim.Optimizer) -> None:
    """Make sure that an optimizer without state can step its parameters one after the other.

    Raises:
        ConfigError: it cannot.
    """
    if not takes_turns(optimizer):
        raise ConfigError(
            f"--optim.offload cpu steps one part of the parameters after the other, and a step of"
            f" {type(optimizer).__name__} depends on all of them, on random numbers, or cannot be tried out. Leave it"
            " out, or use adamw"
        )


class Offload:
    """Keeps the state of one optimizer in host memory, pinned where its parameters are on a GPU.

    Args:
        optimizer: whose, `check_turns` has passed; what state it has moves at once.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._host: dict[tuple[Tensor, str], Tensor] = {}
        """Where each entry lies in host memory: the same memory is used again in every step."""
        self._memory: dict[bool, PinnedMemory] = {}
        """Where more of it comes from: for parameters on GPUs, and for others."""
        self.take_over(optimizer)

    def take_over(self, optimizer: torch.optim.Optimizer) -> None:
        """Move the state that an optimizer has now to host memory."""
        for parameter in owned_by(optimizer):
            if parameter in optimizer.state:
                self._put_back(optimizer, parameter)
        _wait(owned_by(optimizer))

    def step(self, optimizer: Any, step: Callable[..., Any], closure: Callable[[], Any] | None = None) -> Any:
        """Take a step with `step`, the optimizer's own, part by part; its hooks are not called.

        Parameters without a gradient are left out: no optimizer moves them, and their state stays where it is.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = optimizer.param_groups
        before = [group["params"] for group in groups]
        moved = [parameter for parameter in owned_by(optimizer) if parameter.grad is not None]
        try:
            with without_step_hooks(optimizer):
                for chunk in in_chunks([parameter.nbytes for parameter in moved]):
                    own = {moved[place] for place in chunk}
                    for group, parameters in zip(groups, before, strict=True):
                        group["params"] = [parameter for parameter in parameters if parameter in own]
                    for parameter in own:
                        self._fetch(optimizer, parameter)
                    step(optimizer)
                    for parameter in own:
                        self._put_back(optimizer, parameter)
        finally:
            for group, parameters in zip(groups, before, strict=True):
                group["params"] = parameters
        _wait(moved)
        return loss

    def _fetch(self, optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> None:
        entries = optimizer.state.get(parameter, {})
        for key, value in entries.items():
            entries[key] = _each_large(
                value, key, lambda _, own: own.to(parameter.device, non_blocking=True, copy=True)
            )

    def _put_back(self, optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> None:
        entries = optimizer.state.get(parameter, {})
        for key, value in entries.items():
            entries[key] = _each_large(
                value,
                key,
                lambda place, own: self._in_host_memory(parameter, place, own).copy_(own, non_blocking=True),
            )

    def _in_host_memory(self, parameter: Tensor, key: str, value: Tensor) -> Tensor:
        found = self._host.get((parameter, key))
        if found is None or (found.shape, found.stride(), found.dtype) != (value.shape, value.stride(), value.dtype):
            is_pinned = _pins(parameter)
            memory = self._memory.get(is_pinned) or self._memory.setdefault(is_pinned, PinnedMemory(is_pinned))
            found = self._host[parameter, key] = memory.empty_like(value)
        return found

    def load(
        self, optimizer: Any, load: Callable[[Any, dict[str, Any]], None], state: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """Load a state with `load`, the optimizer's own, which is not given what stays in host memory.

        It would put all of it where the parameters are, and there may be no room. Returns what it was given.
        """
        saved = state.get("state")
        if not isinstance(saved, Mapping) or not all(isinstance(entries, Mapping) for entries in saved.values()):
            load(optimizer, dict(state))  # a form of the class's own
            self.take_over(optimizer)
            return state
        small = {
            number: {key: value for key, value in entries.items() if not _has_large(value)}
            for number, entries in saved.items()
        }
        given = {**state, "state": small}
        load(optimizer, given)
        for number, parameter in enumerate(owned_by(optimizer)):
            for key, value in saved.get(number, {}).items():
                if _has_large(value):
                    optimizer.state[parameter][key] = _each_large(value, key, partial(self._kept, parameter))
        return given

    def _kept(self, parameter: nn.Parameter, place: str, value: Tensor) -> Tensor:
        """Return a loaded entry in host memory."""
        value = laid_as(parameter, value)
        return self._in_host_memory(parameter, place, value).copy_(value)


def step_in_parts(inner: type[torch.optim.Optimizer]) -> Any:
    """Return a `step` for a class derived from `inner` whose objects have an `offload`; hooks run around it once."""
    whole: Any = inner.step
    whole = whole.__wrapped__ if getattr(whole, "hooked", False) else whole

    def step(self: Any, closure: Callable[[], Any] | None = None) -> Any:
        return self.offload.step(self, whole, closure)

    return hooked_step(step)


def _is_large(value: Any) -> bool:
    """Return whether an entry of a state moves: counters stay on their device, where fused kernels want them."""
    return isinstance(value, Tensor) and value.dim() > 0


def _has_large(value: Any) -> bool:
    return any(map(_is_large, tensors_in(value)))


def _each_large(value: Any, key: Any, change: Callable[[str, Tensor], Tensor]) -> Any:
    """Return an entry with each tensor that moves replaced by what `change` makes of it, those in lists and so on too.

    Args:
        value: of the entry.
        key: of the entry.
        change: is given the tensor's place, which is its own in the parameter's state, and the tensor.
    """
    numbers = itertools.count()
    return map_tensors(lambda own: change(f"{key}.{next(numbers)}", own) if _is_large(own) else own, value)


def _pins(parameter: Tensor) -> bool:
    """Return whether what lies in host memory for a parameter is pinned: copies to a GPU are then done by the GPU."""
    return parameter.is_cuda


def _wait(parameters: Sequence[Tensor]) -> None:
    """Wait until copies to host memory have come to their end: whoever reads it, such as a save, asks nobody."""
    for device in {parameter.device for parameter in parameters if parameter.is_cuda}:
        torch.cuda.synchronize(device)
