"""The section of settings about what is written down."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hvdtrain.settings.fields import Section, setting


@dataclass(frozen=True, kw_only=True)
class LogConfig(Section):
    """What is written down, and how often."""

    every: int | str = setting(20, above=0, changeable=True, interval="time")
    """Steps between two lines of metrics; or 1epoch, or 30s for a line about every 30 seconds."""
    grad_norms: bool = setting(False, changeable=True)
    """Also log the norm of each layer's averaged gradient, before clipping."""
    peak_tflops: float | None = setting(None, above=0, changeable=True)
    """What a rank's device can do at most, in TFLOP/s of the type that is trained in: MFU is logged, a share of it.
    None: what data sheets say of GPUs that are known, in 16 bits; of others MFU is not logged. `bench` measures it."""
    tensorboard: bool = setting(False, changeable=True)
    """Also write TensorBoard event files to RUN_DIR/tensorboard: metrics, settings, samples."""
    wandb: bool = setting(False, changeable=True)
    """Also send metrics, settings and samples to Weights & Biases; WANDB_MODE=offline keeps them in RUN_DIR/wandb."""
    mlflow: bool = setting(False, changeable=True)
    """Also send metrics, settings and samples to MLflow: where MLFLOW_TRACKING_URI says, a server or a folder."""
    project: str | None = setting(None, changeable=True)
    """Project in W&B, experiment in MLflow. None: what WANDB_PROJECT and MLFLOW_EXPERIMENT_NAME say, else hvdtrain."""

    def unused(self) -> Iterator[tuple[str, str]]:
        """Yield what belongs to trackers where there is none."""
        if not (self.wandb or self.mlflow):
            yield "project", "it is for --log.wandb and --log.mlflow"
