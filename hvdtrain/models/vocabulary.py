"""Which parameters belong to a vocabulary: embeddings, and the layer that gives each of their entries a number."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import nn


def of_vocabulary(model: nn.Module) -> set[nn.Parameter]:
    """Return the weights of a model's embeddings and of its output layers; empty for a model that has no embedding.

    An output layer is what a model of transformers calls so (`get_output_embeddings`), or an `nn.Linear` with as many
    outputs as an embedding has rows, if it is the model's last one, or the only one of so many outputs: with as many
    positions as channels, others are none.
    """
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag)]
    found = {table.weight for table in tables}
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    widths = Counter(linear.out_features for linear in linears)
    rows = {table.num_embeddings for table in tables}
    alone = [linear for linear in linears if widths[linear.out_features] == 1]
    found |= {linear.weight for linear in (*alone, *linears[-1:]) if linear.out_features in rows}
    found |= {weight for weight in _named_outputs(model) if tables}
    return {weight for weight in found if isinstance(weight, nn.Parameter)}


def _named_outputs(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        name_it: Any = getattr(module, "get_output_embeddings", None)
        head = None
        if callable(name_it):
            with contextlib.suppress(Exception):  # models without a head raise whatever they like
                head = name_it()
        if isinstance(head, nn.Module):
            yield getattr(head, "weight", None)
