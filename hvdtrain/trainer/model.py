"""The model as it is trained: on its device, in its type, compiled or not."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hvdtrain.errors import ConfigError
from hvdtrain.models.linear import takes_onednn, use_onednn
from hvdtrain.settings import Config, ModelConfig, Precision
from hvdtrain.world import World, has_synchronized_layers, synchronize_batch_norm

_TYPES: dict[Precision, torch.dtype] = {"fp64": torch.float64, "bf16-true": torch.bfloat16}


def own_type(precision: Precision) -> torch.dtype | None:
    """Return the type of weights and inputs where it is not the model's own."""
    return _TYPES.get(precision)


def prepare_model(model: nn.Module, config: Config, world: World) -> nn.Module:
    """Return the model on its device, changed in place; parameters keep their names.

    Raises:
        ConfigError: it has nothing that a setting speaks of, such as blocks.
    """
    settings = config.model
    if settings.sync_batch_norm:
        model = synchronize_batch_norm(model, world)
        if not has_synchronized_layers(model):
            raise ConfigError("--model.sync-batch-norm has no effect: the model has no batch normalisation")
    model = model.to(world.device, own_type(config.train.precision))
    if takes_onednn(settings.linear, world.device):
        use_onednn(model)
    elif settings.linear == "onednn":
        raise ConfigError("--model.linear onednn has no effect: it is for CPUs, and for a torch that has oneDNN")
    prepare_blocks(model, settings)
    return model


def prepare_blocks(model: nn.Module, settings: ModelConfig) -> None:
    """Have the model's blocks checkpoint their activations, and it or them compiled, in place.

    Raises:
        ConfigError: it has no blocks.
    """
    if settings.checkpoint_blocks:
        for block in _blocks(model, "--model.checkpoint-blocks"):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    if settings.compile == "model":
        model.compile()
    elif settings.compile == "blocks":
        for block in _blocks(model, "--model.compile blocks"):
            block.compile()


def _blocks(model: nn.Module, asked_by: str) -> list[nn.Module]:
    blocks = [block for module in model.modules() if isinstance(module, nn.ModuleList) for block in module]
    if not blocks:
        raise ConfigError(f"{asked_by} has no effect: the model has no blocks (no nn.ModuleList)")
    return blocks
