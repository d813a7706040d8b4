"""Settings: frozen dataclasses, and their way to and from files and flags. Standard library only."""

from hvdtrain.settings.batch import BatchPlan, keep_batch, plan_batch
from hvdtrain.settings.fields import Section, changeable_settings, setting
from hvdtrain.settings.log import LogConfig
from hvdtrain.settings.sections import (
    CheckpointConfig,
    CommConfig,
    Config,
    DataConfig,
    EvalConfig,
    HealthConfig,
    ModelConfig,
    OptimConfig,
    Precision,
    TrainConfig,
)
from hvdtrain.settings.values import NONE, merge, nearest, to_dict

__all__ = [
    "NONE",
    "BatchPlan",
    "CheckpointConfig",
    "CommConfig",
    "Config",
    "DataConfig",
    "EvalConfig",
    "HealthConfig",
    "LogConfig",
    "ModelConfig",
    "OptimConfig",
    "Precision",
    "Section",
    "TrainConfig",
    "changeable_settings",
    "keep_batch",
    "merge",
    "nearest",
    "plan_batch",
    "setting",
    "to_dict",
]
