"""The optimizers by name. Adding one: its file, and its line here."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

from hvdtrain.errors import ConfigError
from hvdtrain.optim.torch_class import TorchOptimConfig
from hvdtrain.settings import OptimConfig
from hvdtrain.settings.fields import hints_of
from hvdtrain.settings.units import shortened

if TYPE_CHECKING:
    import torch
    from torch import nn

# Name of the optimizer, and of the file in this folder -> class of its settings there.
OPTIMIZERS = {
    "adamw": "AdamWConfig",
    "sgd": "SgdConfig",
    "muon": "MuonConfig",
    "lars": "LarsConfig",
    "lamb": "LambConfig",
}


def settings_class(name: str) -> type[OptimConfig]:
    """Return the class of an optimizer's settings.

    Raises:
        ConfigError: there is no such optimizer. Whether torch.optim has a class of that name is found when it is built.
    """
    if name in OPTIMIZERS:
        module = importlib.import_module(f"hvdtrain.optim.{name}")
        return cast(type[OptimConfig], getattr(module, OPTIMIZERS[name]))
    if not (name.isidentifier() and name[:1].isupper()):
        known = f"known are {', '.join(OPTIMIZERS)} and the classes of torch.optim, such as NAdam"
        raise ConfigError(f"there is no optimizer '{shortened(name)}': {known}")
    return TorchOptimConfig


def with_name(optim: OptimConfig, name: str) -> OptimConfig:
    """Return the settings of the optimizer `name`, with the values of `optim` for what both of them have.

    Raises:
        ConfigError: there is no such optimizer.
    """
    kind = settings_class(name)
    if type(optim) is kind and optim.name == name:
        return optim
    shared = {item.name for item in dataclasses.fields(kind)} & {item.name for item in dataclasses.fields(optim)}
    return kind(**{**{shared_name: getattr(optim, shared_name) for shared_name in shared}, "name": name})


def own_class(optim: OptimConfig) -> OptimConfig:
    """Return the settings as the class of their optimizer, for a recipe that has written `OptimConfig(...)`.

    A class of the user's own stays what it is.
    """
    return with_name(optim, optim.name) if type(optim) is OptimConfig else optim


def owners(setting: str) -> Iterator[str]:
    """Yield the names of the optimizers that have a setting of this name."""
    for name in OPTIMIZERS:
        if setting in {item.name for item in dataclasses.fields(settings_class(name))}:
            yield name


def all_settings(prefix: str) -> dict[str, Any]:
    """Return the type of every setting of every optimizer, by its name after `prefix`."""
    kinds = [settings_class(name) for name in OPTIMIZERS]
    return {f"{prefix}{name}": hint for kind in kinds for name, hint in hints_of(kind).items()}


def build_optimizer(optim: OptimConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer over the model's trainable parameters, matrices decayed and vectors not.

    Raises:
        ConfigError: there is no such optimizer.
    """
    return cast("torch.optim.Optimizer", own_class(optim).build(model))  # type: ignore[attr-defined]
