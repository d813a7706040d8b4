"""A model of transformers while it is tried: nothing that it computes is random."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from hvdtrain.recipes.transformers_models.forward import draws, run


@contextlib.contextmanager
def probing(model: nn.Module) -> Iterator[bool]:
    """Within, nothing that the model computes is random; tells whether training it is."""
    was_training = model.training
    with torch.no_grad():
        model.train()
        is_random = _draws_random_numbers(model)
        model.train(not is_random)
        try:
            yield is_random
        finally:
            model.train(was_training)


def _draws_random_numbers(model: nn.Module) -> bool:
    """Return whether a forward pass draws any, as for dropout; the generators are put back."""
    device = next(model.parameters()).device
    tokens = torch.arange(8, device=device)[None]
    try:
        return draws(device, lambda: run(model, {"input_ids": tokens}))
    except Exception:  # whatever a model's code does; the trial will tell
        return True


def logits_apart(alone: Tensor, together: Tensor) -> float:
    """Return how far a sample's logits beside others, `(T, V)`, are from those alone: the norm of their difference.

    It is relative to how far the logits are from even ones.
    """
    spread = alone - alone.mean(-1, keepdim=True)
    return float((together - alone).norm() / spread.norm().clamp_min(1e-30))
