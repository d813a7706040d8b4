"""The sink of TensorBoard."""

from __future__ import annotations

from typing import Any

from hvdtrain.errors import ConfigError
from hvdtrain.rundir.directory import RunDirectory
from hvdtrain.rundir.sinks.sink import Metrics, Samples
from hvdtrain.rundir.sinks.tracked import image_of

_COMPARED = "val/loss"


class TensorBoard:
    """Writes TensorBoard event files to `RUN_DIR/tensorboard`: metrics, settings, samples.

    Raises:
        ConfigError: TensorBoard is not installed.
    """

    def __init__(self, run: RunDirectory) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError("--log.tensorboard needs TensorBoard: pip install 'hvdtrain[tensorboard]'") from error
        self._run = run
        self._open = SummaryWriter
        self._writer: Any = None

    def begin(self, step: int, num_steps: int) -> None:
        """Open the files and write the settings; on resume, what they hold of later steps is hidden."""
        self._writer = self._open(str(self._run.tensorboard), purge_step=step + 1 if step else None)
        settings = self._run.read_settings()
        if settings:
            self._write_settings(settings, step)

    def _write_settings(self, settings: dict[str, Any], step: int) -> None:
        """Write the settings as hyperparameters of this run itself: `add_hparams` would make another run for them."""
        from torch.utils.tensorboard import summary

        values = {name: value if type(value) in (bool, int, float) else str(value) for name, value in settings.items()}
        build: Any = summary.hparams  # has no types
        for part in build(values, {_COMPARED: 0.0})[:2]:  # the third would say that the run is over
            self._writer.file_writer.add_summary(part)
        rows = [f"| {name} | {_in_table(value)} |" for name, value in settings.items()]
        self._writer.add_text("settings", "\n".join(["| setting | value |", "|---|---|", *rows]), step)

    def write(self, step: int, metrics: Metrics, event: str | None) -> None:
        """Write each metric as a scalar."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def show(self, step: int, samples: Samples) -> None:
        """Write texts, as they are, and images."""
        for name, value in samples.items():
            if isinstance(value, str):
                self._writer.add_text(f"samples/{name}", "\n".join(f"    {line}" for line in value.split("\n")), step)
            else:
                self._writer.add_image(f"samples/{name}", image_of(value), step, dataformats="HWC")

    def close(self) -> None:
        """Flush and close."""
        if self._writer:
            self._writer.close()


def _in_table(value: object) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")
