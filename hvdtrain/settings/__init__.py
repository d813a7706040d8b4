"""Settings: frozen dataclasses, and their way to and from files and flags. Standard library only."""

from hvdtrain.settings.batch import BatchPlan, keep_batch, plan_batch
from hvdtrain.settings.comm import CommConfig
from hvdtrain.settings.fields import Section, changeable_settings, setting
from hvdtrain.settings.log import LogConfig
from hvdtrain.settings.profiling import ProfileConfig
from hvdtrain.settings.sections import (
    CheckpointConfig,
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
    "ProfileConfig",
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
