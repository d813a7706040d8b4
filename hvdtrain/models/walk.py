"""A model's parameters, in a fraction of the time of torch's own walk, since once a step that shows; an optimizer's."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn


def parameters_of(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of a model, each once, in the order of `model.parameters()`.

    A class that has a walk of its own is asked for it.
    """
    found: dict[nn.Parameter, None] = {}
    seen: set[nn.Module] = set()
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        if _has_own_walk(type(module)):
            return [*model.parameters()]
        for parameter in module._parameters.values():
            if parameter is not None:
                found[parameter] = None
        waiting += [part for part in reversed(module._modules.values()) if part is not None]
    return [*found]


def owned_by(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Return the parameters that an optimizer moves, in the order of its groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _has_own_walk(kind: type[nn.Module]) -> bool:
    return (kind.parameters, kind.named_parameters, kind.named_modules, kind._named_members) != _WALKS


_WALKS = (nn.Module.parameters, nn.Module.named_parameters, nn.Module.named_modules, nn.Module._named_members)


def sparse_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Return the weights of embeddings that were built with `sparse=True`."""
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag)]
    return {cast(nn.Parameter, module.weight) for module in embeddings if module.sparse}
