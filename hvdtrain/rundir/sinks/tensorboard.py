"""The sink of TensorBoard."""

from __future__ import annotations

from typing import Any

from hvdtrain.errors import ConfigError
from hvdtrain.rundir.directory import RunDirectory
from hvdtrain.rundir.sinks.sink import Metrics


class TensorBoard:
    """Writes TensorBoard event files to `RUN_DIR/tensorboard`.

    Raises:
        ConfigError: TensorBoard is not installed.
    """

    def __init__(self, run: RunDirectory) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError("--log.tensorboard needs TensorBoard: pip install tensorboard") from error
        self._folder = str(run.tensorboard)
        self._open = SummaryWriter
        self._writer: Any = None

    def begin(self, step: int, num_steps: int) -> None:
        """Open the files; on resume, what they hold of later steps is hidden."""
        self._writer = self._open(self._folder, purge_step=step + 1 if step else None)

    def write(self, step: int, metrics: Metrics, event: str | None) -> None:
        """Write each metric as a scalar."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close."""
        if self._writer:
            self._writer.close()
