"""The sink of Weights & Biases, by its own library."""

from __future__ import annotations

import html
import os
import secrets
from typing import Any

from hvdtrain.rundir.directory import RunDirectory
from hvdtrain.rundir.sinks.background import SECONDS_TO_CLOSE
from hvdtrain.rundir.sinks.sink import Metrics, Samples
from hvdtrain.rundir.sinks.tracked import DEFAULT_PROJECT, image_of, library_of, remember, remembered


class WandB:
    """Sends metrics, settings and samples to Weights & Biases, or with `WANDB_MODE=offline` to `RUN_DIR/wandb`.

    A run that goes on is the same run there. What the settings do not say (who, where, offline) is read from the
    variables that its library knows.

    Raises:
        ConfigError: its library is not installed.
    """

    def __init__(self, run: RunDirectory, project: str | None) -> None:
        self._run, self._project = run, project
        self._library = library_of("wandb", "--log.wandb", "init")
        self._logged: Any = None
        self._has_finished = False

    def begin(self, step: int, num_steps: int) -> None:
        """Open the run, or the one of an earlier start."""
        library, known = self._library, remembered(self._run, "wandb")
        name = known or secrets.token_hex(4)
        # Lines on standard output are in the run's own log; a wrapper around it would hold them up.
        options: dict[str, Any] = {"console": "off"}
        if "finish_timeout" in getattr(library.Settings, "model_fields", ()):  # it also holds up the end of the process
            options["finish_timeout"] = SECONDS_TO_CLOSE
        self._logged = library.init(
            project=self._project or os.environ.get("WANDB_PROJECT") or DEFAULT_PROJECT,
            id=name,
            name=os.environ.get("WANDB_NAME") or self._run.path.resolve().name,
            dir=str(self._run.path.resolve()),
            resume="allow",
            config=self._run.read_settings(),
            allow_val_change=True,
            settings=library.Settings(**options),
        )
        remember(self._run, "wandb", name)
        # A step of its own: W&B's counts calls and never goes back, as a run does that goes on from a checkpoint.
        self._logged.define_metric("step")
        self._logged.define_metric("*", step_metric="step")

    def write(self, step: int, metrics: Metrics, event: str | None) -> None:
        """Log the metrics of a step."""
        self._has_finished = event == "finished"
        self._logged.log({"step": step, **metrics})

    def show(self, step: int, samples: Samples) -> None:
        """Log texts and images."""
        shown = {f"samples/{name}": self._sample(value) for name, value in samples.items()}
        self._logged.log({"step": step, **shown})

    def _sample(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._library.Html(f"<pre>{html.escape(value)}</pre>", inject=False)
        return self._library.Image(image_of(value))

    def close(self) -> None:
        """Finish the run; one that has not come to its end is shown as preempted: it may go on."""
        if self._logged is None:
            return
        if not self._has_finished:
            self._logged.mark_preempting()
        self._logged.finish(exit_code=0 if self._has_finished else 1)
