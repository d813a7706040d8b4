"""What a model's `state_dict()` holds, as it is saved: each tensor once, and the rest that hooks and modules add."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from hvdtrain.errors import ConfigError, ResumeError
from hvdtrain.models.elsewhere import kept_elsewhere


def model_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return each tensor of `state_dict()` once, by its first name: tied weights are stored once.

    Names are those of the model as it was before `torch.compile`, which puts `_orig_mod.` before them. State-dict hooks
    are heard: what they rename has its new name. Tensors are the model's own memory wherever `state_dict()`'s are.
    """
    state = model.state_dict()
    first = _first_names(state)
    return {_plain(name): value.detach() for name, value in state.items() if first.get(name) == name}


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of each of `model_weights`, by name."""
    return {name: tuple(tensor.shape) for name, tensor in model_weights(model).items()}


def parameter_names(model: nn.Module) -> frozenset[str]:
    """Return those names of `model_weights` that are parameters, not buffers."""
    return frozenset(_plain(name) for name, _ in model.named_parameters())


def extra_state(model: nn.Module) -> dict[str, Any]:
    """Return what `state_dict()` holds besides tensors, such as what modules return from `get_extra_state`."""
    return {_plain(name): value for name, value in model.state_dict().items() if not isinstance(value, Tensor)}


def load_model_weights(model: nn.Module, weights: Mapping[str, Tensor], extra: Mapping[str, Any] | None = None) -> None:
    """Load what `model_weights` and `extra_state` returned, by the model's `load_state_dict`, hooks included.

    Raises:
        ResumeError: names or shapes differ; the message names the first few.
    """
    state = model.state_dict()
    saved = {**weights, **(extra or {})}
    first = _first_names(state)
    sources = {name: _plain(first.get(name, name)) for name in state}
    problems = _problems({sources[name]: state[name] for name in state}, saved)
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise ResumeError(f"the checkpoint is of another model: {'; '.join(problems[:3])}{more}")
    try:
        model.load_state_dict({name: saved[source] for name, source in sources.items()})
    except RuntimeError as error:
        raise ResumeError(
            f"the model's load_state_dict() refuses what its state_dict() has returned: {error}"
        ) from error


def has_plain_state(model: nn.Module) -> bool:
    """Tell whether `state_dict()` holds parameters and persistent buffers under their own names, and nothing else.

    Those that `keep_elsewhere` was told of may be missing.
    """
    live = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    state = model.state_dict()
    own = {name for name, _ in model.named_parameters()} - kept_elsewhere(model)
    is_live = all(name in live and _place(live[name]) == _place(state[name]) for name in _first_names(state).values())
    return is_live and own <= state.keys() and not extra_state(model)


def check_can_be_saved(model: nn.Module) -> None:
    """Make sure that what would be saved can be loaded, where hooks or modules have a say in it.

    Raises:
        ConfigError: it cannot.
    """
    if has_plain_state(model):
        return
    try:
        load_model_weights(model, {k: v.clone() for k, v in model_weights(model).items()}, extra_state(model))
    except ResumeError as error:
        raise ConfigError(
            f"this model could not be resumed: {error}. Give each state-dict hook that renames or drops something its"
            " counterpart (register_load_state_dict_pre_hook)"
        ) from error


def check_types(model: nn.Module) -> None:
    """Make sure that the file of weights has a word for the type of each.

    Raises:
        ConfigError: it has none, as for complex128 and for sparse tensors.
    """
    known: dict[torch.dtype, bool] = {}
    for name, value in model_weights(model).items():
        if value.dtype not in known:
            known[value.dtype] = _can_be_written(value.dtype)
        if not known[value.dtype] or value.layout != torch.strided:
            kind = value.dtype if value.layout == torch.strided else value.layout
            raise ConfigError(
                f"{name} is of the type {kind}, which a checkpoint cannot hold: keep it as another, such as complex64,"
                " pairs of real numbers (torch.view_as_real) or a dense tensor"
            )


def _can_be_written(dtype: torch.dtype) -> bool:
    try:
        safetensors.torch.save({"tensor": torch.empty(0, dtype=dtype)})
    except Exception:  # of whatever kind the library has for it
        return False
    return True


def _problems(own: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    missing = [f"{name} is missing from it" for name in sorted(own.keys() - saved.keys())]
    unknown = [f"{name} is not in this model" for name in sorted(saved.keys() - own.keys())]
    shapes = [
        f"{name} is {tuple(saved[name].shape)} in the checkpoint and {tuple(own[name].shape)} in this model"
        for name in sorted(own.keys() & saved.keys())
        if isinstance(own[name], Tensor) and isinstance(saved[name], Tensor) and own[name].shape != saved[name].shape
    ]
    return missing + unknown + shapes


def _first_names(state: Mapping[str, Any]) -> dict[str, str]:
    """Return, for the name of each tensor, the first name under which the same one stands."""
    first: dict[tuple[Any, ...], str] = {}
    return {
        name: first.setdefault(_place(value) or (name,), name)
        for name, value in state.items()
        if isinstance(value, Tensor)
    }


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Return what two tensors have in common only if they are the same memory, read alike; nothing for empty ones."""
    if not tensor.numel() or tensor.layout != torch.strided:
        return ()
    # A storage is the same object as long as it lives; it holds no address on the meta device.
    return tensor.untyped_storage(), tensor.dtype, tensor.storage_offset(), tuple(tensor.shape), tensor.stride()


def _plain(name: str) -> str:
    return name.replace("_orig_mod.", "")
