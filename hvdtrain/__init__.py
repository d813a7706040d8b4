"""Data-parallel training of language and vision models with Horovod.

    python -m hvdtrain                                train a small language model, one process
    horovodrun -np 4 python -m hvdtrain               the same on four ranks

In a program of your own: `hvdtrain.train("lm", train={"steps": 100})` trains a recipe and returns its metrics;
for your own loop, `world = hvdtrain.init()`, then `world.wrap(optimizer, model)`.
"""

from __future__ import annotations

__version__ = "0.1.0"

# Without `typing`, and what that imports: `process.working_directory` comes first.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from hvdtrain.data.dataset import Dataset, TensorSamples
    from hvdtrain.data.draws import Draws
    from hvdtrain.data.samplers import InOrder, Shuffled, Weighted
    from hvdtrain.data.shards import ParquetSamples, TarSamples
    from hvdtrain.errors import (
        CheckpointError,
        ConfigError,
        DivergedError,
        HvdtrainError,
        StopRequested,
        UsageError,
    )  # fmt: skip
    from hvdtrain.optim.adamw import AdamWConfig
    from hvdtrain.optim.muon import MuonConfig
    from hvdtrain.optim.sgd import SgdConfig
    from hvdtrain.settings import (
        CheckpointConfig,
        CommConfig,
        Config,
        DataConfig,
        EvalConfig,
        HealthConfig,
        LogConfig,
        ModelConfig,
        OptimConfig,
        Section,
        TrainConfig,
        setting,
    )  # fmt: skip
    from hvdtrain.trainer import Recipe, Task
    from hvdtrain.trainer.callback import Callback
    from hvdtrain.trainer.unfreezing import GradualUnfreezing
    from hvdtrain.verbs.train import TrainResult, train
    from hvdtrain.world import World, init
    from hvdtrain.world.launched import launch

# Imported on first use: the command line must set the number of threads before torch starts.
_HOMES = {
    "hvdtrain.settings": (
        "CheckpointConfig", "CommConfig", "Config", "DataConfig", "EvalConfig", "HealthConfig", "LogConfig",
        "ModelConfig", "OptimConfig", "Section", "TrainConfig", "setting",
    ),
    "hvdtrain.optim.adamw": ("AdamWConfig",),
    "hvdtrain.optim.muon": ("MuonConfig",),
    "hvdtrain.optim.sgd": ("SgdConfig",),
    "hvdtrain.data.dataset": ("Dataset", "TensorSamples"),
    "hvdtrain.data.draws": ("Draws",),
    "hvdtrain.data.shards": ("ParquetSamples", "TarSamples"),
    "hvdtrain.data.samplers": ("InOrder", "Shuffled", "Weighted"),
    "hvdtrain.world": ("World", "init"),
    "hvdtrain.world.launched": ("launch",),
    "hvdtrain.errors": (
        "CheckpointError", "ConfigError", "DivergedError", "HvdtrainError", "StopRequested", "UsageError",
    ),
    "hvdtrain.trainer": ("Recipe", "Task"),
    "hvdtrain.trainer.callback": ("Callback",),
    "hvdtrain.trainer.unfreezing": ("GradualUnfreezing",),
    "hvdtrain.verbs.train": ("TrainResult", "train"),
}  # fmt: skip

__all__ = [
    "AdamWConfig",
    "Callback",
    "CheckpointConfig",
    "CheckpointError",
    "CommConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "Dataset",
    "DivergedError",
    "Draws",
    "EvalConfig",
    "GradualUnfreezing",
    "HealthConfig",
    "HvdtrainError",
    "InOrder",
    "LogConfig",
    "ModelConfig",
    "MuonConfig",
    "OptimConfig",
    "ParquetSamples",
    "Recipe",
    "Section",
    "SgdConfig",
    "Shuffled",
    "StopRequested",
    "TarSamples",
    "Task",
    "TensorSamples",
    "TrainConfig",
    "TrainResult",
    "UsageError",
    "Weighted",
    "World",
    "init",
    "launch",
    "setting",
    "train",
]


def __getattr__(name: str) -> Any:
    import importlib

    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module 'hvdtrain' has no attribute '{name}'")
