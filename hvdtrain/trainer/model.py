"""The model as it is trained: on its device, in its type, compiled or not."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hvdtrain.errors import ConfigError
from hvdtrain.models.attention import use_onednn_attention
from hvdtrain.models.kept import buffer_places
from hvdtrain.models.linear import takes_onednn, use_onednn
from hvdtrain.models.private_torch import BatchNorm, apply_to_tensors, compile_in_place
from hvdtrain.settings import Config, ModelConfig, Precision
from hvdtrain.trainer.compiling import blocks_of, note_compilations, what_is_compiled
from hvdtrain.trainer.precision import takes_onednn_attention
from hvdtrain.world import World, synchronize_batch_norm

_TYPES: dict[Precision, torch.dtype] = {"fp64": torch.float64, "bf16-true": torch.bfloat16}


def wide_type(dtype: torch.dtype) -> torch.dtype:
    """Return a type in which a small share of a weight is not rounded away."""
    return torch.promote_types(dtype, torch.float32)


def own_type(precision: Precision) -> torch.dtype | None:
    """Return the type of weights and inputs where it is not the model's own."""
    return _TYPES.get(precision)


def prepare_model(model: nn.Module, config: Config, world: World) -> nn.Module:
    """Return the model on its device, changed in place; parameters keep their names.

    Raises:
        ConfigError: it has nothing that a setting speaks of, such as blocks.
    """
    settings = config.model
    empty = next((name for name, parameter in model.named_parameters() if parameter.is_meta), "")
    if empty:
        raise ConfigError(f"the model's {empty} is on torch's device meta, and has no numbers: give it some in build()")
    check_settings_of(model, config, world)
    if settings.sync_batch_norm:
        model = synchronize_batch_norm(model, world)
    model = _converted(model.to(world.device), own_type(config.train.precision))
    use_onednn_attention(takes_onednn_attention(settings.linear, world.device))
    if takes_onednn(settings.linear, world.device):
        use_onednn(model)
    settings = dataclasses.replace(settings, compile=what_is_compiled(settings, model, world.device))
    if settings.compile != "none":
        note_compilations(world)
    prepare_blocks(model, settings)
    return model


def check_settings_of(model: nn.Module, config: Config, world: World) -> None:
    """Make sure that the model, which may have no numbers, and this machine have what the settings speak of.

    Raises:
        ConfigError: they have not.
    """
    settings = config.model
    if settings.sync_batch_norm and not any(isinstance(module, BatchNorm) for module in model.modules()):
        raise ConfigError("--model.sync-batch-norm has no effect: the model has no batch normalisation")
    if settings.linear == "onednn" and not takes_onednn(settings.linear, world.device):
        raise ConfigError("--model.linear onednn has no effect: it is for CPUs, and for a torch that has oneDNN")
    if settings.checkpoint_blocks:
        _blocks(model, "--model.checkpoint-blocks")
    if settings.compile == "blocks":
        _blocks(model, "--model.compile blocks")


def _converted(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """Return the model with its real numbers as `dtype`, in place; None: as they are.

    `model.to(dtype)` would take the imaginary part from complex ones, such as tables of rotations.
    """
    return model if dtype is None else apply_to_tensors(model, lambda tensor: tensor.to(type_as(tensor, dtype)))


def type_as(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """Return the type of a tensor where real numbers are to be of type `dtype`, if one is given."""
    if dtype == torch.float64 and tensor.is_complex():
        return torch.complex128
    return dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype


def prepare_blocks(model: nn.Module, settings: ModelConfig) -> None:
    """Have the model's blocks checkpoint their activations, and it or them compiled, in place.

    Raises:
        ConfigError: it has no blocks.
    """
    if settings.checkpoint_blocks:
        # A compiler accepts no contexts; what it computes again, it decides itself.
        has_contexts = settings.compile == "none"
        for block in _blocks(model, "--model.checkpoint-blocks"):
            more: dict[str, Any] = {"context_fn": partial(_computed_again, block)} if has_contexts else {}
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, **more)
    if settings.compile == "model":
        compile_in_place(model)
    elif settings.compile == "blocks":
        for block in _blocks(model, "--model.compile blocks"):
            compile_in_place(block)


def _blocks(model: nn.Module, asked_by: str) -> list[nn.Module]:
    blocks = blocks_of(model)
    if not blocks:
        raise ConfigError(f"{asked_by} has no effect: the model has no blocks (no nn.ModuleList)")
    return blocks


def _computed_again(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return contexts for a block's forward pass and for its repetition, which changes no buffer once more.

    The repetition begins with the buffers that the pass began with, as batch normalisation counts a batch and spectral
    normalisation goes on from its last vectors. Of what is not saved, such as tables, no copy is kept until then.
    """
    before: list[tuple[nn.Module, str, Tensor]] = []

    @contextmanager
    def first() -> Iterator[None]:
        saved = buffer_places(block, is_saved=True)
        before.extend((module, name, getattr(module, name).clone()) for module, name in saved)
        yield

    @contextmanager
    def again() -> Iterator[None]:
        kept = [(module, name, getattr(module, name)) for module, name in buffer_places(block)]
        for module, name, buffer in kept:
            setattr(module, name, buffer.clone())
        for module, name, buffer in before:
            setattr(module, name, buffer)
        try:
            yield
        finally:  # it ends by an exception as soon as all is there that was wanted
            for module, name, buffer in kept:
                setattr(module, name, buffer)

    return first(), again()
