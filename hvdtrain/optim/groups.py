"""Which of a model's parameters are trained, and which of them decay."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that are trained, or will be once they are unfrozen; torch leaves frozen ones alone."""
    return [parameter for parameter in model.parameters() if parameter.is_floating_point() or parameter.is_complex()]


def trainable_by_name(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the same parameters by the names that `named_parameters` gives them."""
    own = set(trainable(model))
    return {name: parameter for name, parameter in model.named_parameters() if parameter in own}


def sparse_weights(model: nn.Module) -> set[int]:
    """Return the ids of the weights of embeddings with sparse gradients."""
    return {id(module.weight) for module in model.modules() if getattr(module, "sparse", False) is True}


def decay_groups(model: nn.Module, parameters: list[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Return parameter groups for a torch optimizer: matrices decayed, vectors not.

    Norm gains and biases (fewer than two dimensions) are left out of weight decay, as is usual for transformers, and
    so are embeddings with sparse gradients, which torch cannot decay.
    """
    sparse = sparse_weights(model)
    decayed = {parameter for parameter in parameters if parameter.ndim >= 2 and id(parameter) not in sparse}
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in parameters if parameter in decayed], "weight_decay": weight_decay},
        {"params": [parameter for parameter in parameters if parameter not in decayed], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
