"""Models of transformers with one input as programs of torch.export: tokens or waves in, logits out."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from hvdtrain.errors import ConfigError
from hvdtrain.recipes.transformers_models.auto_classes import load_trained
from hvdtrain.recipes.transformers_models.forward import run
from hvdtrain.recipes.transformers_models.probe import describe
from hvdtrain.rundir.trained import Trained

_ROWS, _TOKENS, _FRAMES = 2, 11, 16_000
"""Of the example that is followed; programs take any number, and any length that the model does."""


class _Logits(nn.Module):
    """A model's logits, without what else it returns."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, given: Tensor) -> Tensor:
        whole: Any = self.model
        logits: Tensor = run(self.model, {whole.main_input_name: given}).logits
        return logits


def program_of(trained: Trained, weights: dict[str, Tensor], kind: str) -> ExportedProgram:
    """Return the program of a model for any number of rows, of any length.

    Args:
        trained: where the files lie that say what the model is.
        weights: the model's, in the type that the program computes in.
        kind: its auto class: AutoModelForCausalLM or AutoModelForCTC.

    Raises:
        ConfigError: torch.export cannot follow the model.
        DataError: it cannot be loaded.
    """
    model = load_trained(replace(trained, weights=weights), kind).cpu()
    model.to(next(tensor.dtype for tensor in weights.values() if tensor.is_floating_point()))
    given = torch.zeros(_ROWS, _TOKENS, dtype=torch.int64)
    if model.main_input_name != "input_ids":
        given = torch.randn(_ROWS, _FRAMES, dtype=next(model.parameters()).dtype)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            shapes = {"given": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}}
            return torch.export.export(_Logits(model), (given,), dynamic_shapes=shapes)
    except Exception as error:  # whatever tracing a model raises
        raise ConfigError(f"torch.export cannot follow {trained.source}: {describe(error)[:200]}") from error
