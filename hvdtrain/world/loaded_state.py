"""An optimizer's state, loaded so that it goes on bit by bit and schedulers keep what they hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from hvdtrain.models.walk import owned_by
from hvdtrain.world.alike import check_same

if TYPE_CHECKING:
    from hvdtrain.world.world import World


def load_in_place(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load a state; parameter groups, and tensors in them, stay the objects that schedulers hold."""
    groups = optimizer.param_groups
    before = [dict(group) for group in groups]
    optimizer.load_state_dict(cast(Any, state))
    loaded, optimizer.param_groups = optimizer.param_groups, groups
    for group, old, new in zip(groups, before, loaded, strict=True):
        for key, value in new.items():
            if isinstance(value, Tensor) and isinstance(old.get(key), Tensor):
                value = old[key].copy_(value)
            group[key] = value


def restore_types(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Give loaded entries back the type that they were saved in, and the order in memory of their parameters.

    torch's `load_state_dict` casts to the parameter's type: NAdam's running product, for one, is fp32 beside fp64
    parameters, and would go on with other last bits. Fused kernels go through parameters and entries as they lie in
    memory, and what was saved lies in its logical order.
    """
    saved = state.get("state")
    entries_of = saved if isinstance(saved, Mapping) else {}  # else a form of the class's own, which it has loaded
    for place, parameter in enumerate(owned_by(optimizer)):
        if parameter not in optimizer.state:
            continue
        entries = optimizer.state[parameter]
        for name, value in entries_of.get(place, {}).items():
            if name in entries:
                entries[name] = _of_saved_type(entries[name], value)
        if isinstance(entries, dict):
            entries.update({name: laid_as(parameter, value) for name, value in entries.items()})


def _of_saved_type(loaded: Any, saved: Any) -> Any:
    """Return an entry as it was loaded, with the tensors that were cast as they were saved; those in lists, too."""
    if isinstance(saved, Tensor):
        is_cast = isinstance(loaded, Tensor) and loaded.dtype != saved.dtype
        return saved.detach().clone().to(loaded.device) if is_cast else loaded
    if isinstance(saved, dict) and isinstance(loaded, dict) and saved.keys() == loaded.keys():
        return {key: _of_saved_type(value, saved[key]) for key, value in loaded.items()}
    if type(saved) in (list, tuple) and type(loaded) is type(saved) and len(loaded) == len(saved):
        return type(saved)(map(_of_saved_type, loaded, saved))
    return loaded


def laid_as(parameter: Tensor, value: Any) -> Any:
    """Return an entry of a parameter's state so that it lies in memory as the parameter does, if it has its shape."""
    if not isinstance(value, Tensor) or value.shape != parameter.shape or value.stride() == parameter.stride():
        return value
    if value.layout != torch.strided or value.dim() == 0:
        return value
    return torch.empty_like(parameter, dtype=value.dtype, device=value.device, requires_grad=False).copy_(value)


@dataclass(frozen=True)
class _Form:
    """Stands for a tensor that is sent by itself."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    is_on_host: bool


def send_state(world: World, optimizer: torch.optim.Optimizer, root: int) -> None:
    """Make every rank's optimizer state that of rank `root`. Collective.

    What is large is sent tensor by tensor, to where it will lie: no rank holds any of it twice, nor in host memory what
    belongs on its GPU.

    Raises:
        ConfigError: ranks have other groups of parameters.
    """
    groups = [
        (f"group {i} of {type(optimizer).__name__}", len(g["params"])) for i, g in enumerate(optimizer.param_groups)
    ]
    check_same(world, [], "broadcast of an optimizer's state", dict(groups))
    state = optimizer.state_dict() if world.rank == root else None
    tensors: dict[str, Tensor] = {}
    outline: Any = world.broadcast_object(None if state is None else _outlined(state, tensors), "optimizer", root)
    if state is None:
        outline = {**outline, "state": _filled(outline["state"], tensors, world.device)}
    world.broadcast_tensors(tensors, "optimizer.state", root)
    if state is None:
        load_in_place(optimizer, outline)


def _outlined(state: Mapping[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return a state with forms in the place of tensors, which are put into `tensors` by their place."""
    entries: Any = state.get("state")
    if not isinstance(entries, Mapping):
        return dict(state)  # a form of the class's own, sent as it is
    found: dict[Any, Any] = {}
    for number, own in entries.items():
        found[number] = own
        if isinstance(number, int) and isinstance(own, Mapping):
            apart = {key: value for key, value in own.items() if _goes_alone(value)}
            tensors.update({f"{number}.{key}": value for key, value in apart.items()})
            found[number] = {**own, **{key: _form_of(value) for key, value in apart.items()}}
    places = Counter(tensor.data_ptr() for tensor in tensors.values())
    if len(places) < len(tensors):  # entries are one tensor: only pickled together they stay so
        tensors.clear()
        return dict(state)
    return {**state, "state": found}


def _filled(entries: Any, tensors: dict[str, Tensor], device: torch.device) -> Any:
    """Return entries with memory in the place of forms, on the device or in host memory; it is put into `tensors`."""
    if not isinstance(entries, Mapping):
        return entries
    found: dict[Any, Any] = {}
    for number, own in entries.items():
        found[number] = own
        if isinstance(number, int) and isinstance(own, Mapping):
            found[number] = dict(own)
            for key, form in own.items():
                if isinstance(form, _Form):
                    where = torch.device("cpu") if form.is_on_host else device
                    memory = torch.empty_strided(form.shape, form.strides, dtype=form.dtype, device=where)
                    found[number][key] = tensors[f"{number}.{key}"] = memory
    return found


def _goes_alone(value: Any) -> bool:
    """Return whether a value is a plain tensor that has its memory for itself; counters go with the rest."""
    if type(value) is not Tensor or value.layout != torch.strided or value.is_quantized or value.dim() == 0:
        return False
    return value.numel() > 0 and value.untyped_storage().nbytes() == value.nbytes


def _form_of(value: Tensor) -> _Form:
    return _Form(tuple(value.shape), value.stride(), value.dtype, value.device.type == "cpu")
