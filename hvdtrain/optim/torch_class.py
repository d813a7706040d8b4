"""The classes of torch.optim by name, each with its own defaults but for learning rate and weight decay."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from hvdtrain.errors import ConfigError
from hvdtrain.settings import OptimConfig, nearest

if TYPE_CHECKING:
    import torch
    from torch import nn

# These need the loss again (LBFGS), or gradients that only sparse embeddings have.
_UNFIT = ("Optimizer", "LBFGS", "SparseAdam", "Muon")


@dataclass(frozen=True, kw_only=True)
class TorchOptimConfig(OptimConfig):
    """A class of torch.optim and its learning-rate schedule."""

    def unused(self) -> Iterator[tuple[str, str]]:
        """Yield the weight decay where the class has none, besides what no optimizer uses."""
        yield from super().unused()
        kind = torch_optimizers().get(self.name)
        if kind is not None and not _decays(kind):
            yield "weight_decay", f"torch.optim.{self.name} has none"

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return the optimizer over the model's trainable parameters.

        Raises:
            ConfigError: torch has no such class, or none that fits.
        """
        from hvdtrain.optim.groups import decay_groups, trainable

        kinds = torch_optimizers()
        kind: Any = kinds.get(self.name)
        if kind is None:
            raise ConfigError(f"--optim.name: there is no optimizer '{self.name}'{nearest(self.name, kinds)}")
        learning = [parameter for parameter in trainable(model) if parameter.numel()]  # Adafactor divides by that
        groups = decay_groups(model, learning, self.weight_decay)
        if not _decays(kind):
            groups = [{"params": group["params"]} for group in groups]
        return cast("torch.optim.Optimizer", kind(groups, lr=self.peak_lr))


def _decays(kind: type[torch.optim.Optimizer]) -> bool:
    return "weight_decay" in inspect.signature(kind).parameters


def torch_optimizers() -> dict[str, type[torch.optim.Optimizer]]:
    """Return the classes that a recipe may name."""
    import torch

    kinds = {name: value for name, value in vars(torch.optim).items() if isinstance(value, type)}
    return {
        name: kind for name, kind in kinds.items() if issubclass(kind, torch.optim.Optimizer) and name not in _UNFIT
    }
