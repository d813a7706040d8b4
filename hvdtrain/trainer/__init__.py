"""The training loop. `loop.fit` decides when, `step.train_step` what; `state` is what is saved and restored."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hvdtrain.trainer.evaluation import evaluate
    from hvdtrain.trainer.job import Job, settle
    from hvdtrain.trainer.loop import fit
    from hvdtrain.trainer.step import train_step
    from hvdtrain.trainer.task import CorpusEvaluation, Evaluation, Recipe, Task

# Imported on first use: a recipe's settings need no torch.
_HOMES = {
    "hvdtrain.trainer.job": ("Job", "settle"),
    "hvdtrain.trainer.evaluation": ("evaluate",),
    "hvdtrain.trainer.loop": ("fit",),
    "hvdtrain.trainer.step": ("train_step",),
    "hvdtrain.trainer.task": ("CorpusEvaluation", "Evaluation", "Recipe", "Task"),
}

__all__ = ["CorpusEvaluation", "Evaluation", "Job", "Recipe", "Task", "evaluate", "fit", "settle", "train_step"]


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module 'hvdtrain.trainer' has no attribute '{name}'")
