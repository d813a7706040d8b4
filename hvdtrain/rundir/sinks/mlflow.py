"""The sink of MLflow, by its own library."""

from __future__ import annotations

import os
import time
from typing import Any

from hvdtrain.rundir.directory import RunDirectory
from hvdtrain.rundir.sinks.sink import Metrics, Samples
from hvdtrain.rundir.sinks.tracked import DEFAULT_PROJECT, image_of, library_of, remember, remembered

# What its servers take at a time, and of a value.
_MOST_PARAMS, _MOST_METRICS, _LONGEST_VALUE = 100, 1000, 500


class MLflow:
    """Sends metrics, settings and samples to MLflow: where `MLFLOW_TRACKING_URI` says, a server or a folder.

    A run that goes on is the same run there. Of settings that have changed since, the first values stay: MLflow lets
    none be replaced.

    Raises:
        ConfigError: its library is not installed.
    """

    def __init__(self, run: RunDirectory, project: str | None) -> None:
        self._run, self._project = run, project
        self._library = library_of("mlflow", "--log.mlflow", "MlflowClient")
        self._client: Any = None
        self._id = ""
        self._has_finished = False

    def begin(self, step: int, num_steps: int) -> None:
        """Open the run, or the one of an earlier start."""
        # Folders are refused by MLflow 3.7 and newer unless this is set; whoever names one has decided.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        # The client, not mlflow.log_metric: that has one run a process, and ends it when the process ends.
        self._client = self._library.MlflowClient()
        known = remembered(self._run, "mlflow")
        self._id = self._reopened(known) if known else ""
        if not self._id:
            self._id = self._client.create_run(self._experiment(), run_name=self._run.path.resolve().name).info.run_id
            remember(self._run, "mlflow", self._id)
        self._log_settings()

    def _reopened(self, known: str) -> str:
        """Return the run of an earlier start, running again; "" where this server has none of that name."""
        try:
            self._client.get_run(known)
        except self._library.exceptions.MlflowException as error:
            if getattr(error, "error_code", "") != "RESOURCE_DOES_NOT_EXIST":
                raise
            return ""
        self._client.update_run(known, status="RUNNING")
        return known

    def _experiment(self) -> str:
        if "MLFLOW_EXPERIMENT_ID" in os.environ and not self._project:
            return os.environ["MLFLOW_EXPERIMENT_ID"]
        name = self._project or os.environ.get("MLFLOW_EXPERIMENT_NAME") or DEFAULT_PROJECT
        found = self._client.get_experiment_by_name(name)
        return str(found.experiment_id if found else self._client.create_experiment(name))

    def _log_settings(self) -> None:
        kind = self._library.entities.Param
        there = self._client.get_run(self._id).data.params
        settings = self._run.read_settings()
        new = [kind(name, str(value)[:_LONGEST_VALUE]) for name, value in settings.items() if name not in there]
        for first in range(0, len(new), _MOST_PARAMS):
            self._client.log_batch(self._id, params=new[first : first + _MOST_PARAMS])

    def write(self, step: int, metrics: Metrics, event: str | None) -> None:
        """Log the metrics of a step."""
        self._has_finished = event == "finished"
        kind, now = self._library.entities.Metric, int(time.time() * 1000)
        lines = [kind(name, value, now, step) for name, value in metrics.items()]
        for first in range(0, len(lines), _MOST_METRICS):
            self._client.log_batch(self._id, metrics=lines[first : first + _MOST_METRICS])

    def show(self, step: int, samples: Samples) -> None:
        """Log texts and images as artifacts, a folder for each step."""
        for name, value in samples.items():
            path = f"samples/step-{step:08d}/{name}"
            if isinstance(value, str):
                self._client.log_text(self._id, value, f"{path}.txt")
            else:
                self._client.log_image(self._id, image_of(value), f"{path}.png")

    def close(self) -> None:
        """Finish the run; one that has not come to its end is killed, in MLflow's words: it may go on."""
        if self._id:
            self._client.set_terminated(self._id, "FINISHED" if self._has_finished else "KILLED")
