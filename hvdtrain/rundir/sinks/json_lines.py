"""The sink of programs: `metrics.jsonl`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

from hvdtrain.rundir.directory import RunDirectory
from hvdtrain.rundir.metrics import read_metrics
from hvdtrain.rundir.patient_file import PatientFile
from hvdtrain.rundir.sinks.sink import Metrics
from hvdtrain.settings.files import replaced_whole


class JsonLines:
    """Writes `RUN_DIR/metrics.jsonl`: one JSON object a line.

    On resume, lines of steps that the checkpoint does not have are dropped: the run goes through them again. Where the
    disk is full, lines wait until there is room.

    Args:
        run: its directory.
        say: takes what a person should know of the lines that were there.
    """

    def __init__(self, run: RunDirectory, say: Callable[[str], None] = lambda text: None) -> None:
        self._path = run.metrics
        self._say = say
        self._file = PatientFile(run.metrics)
        self._earlier: str | None = None
        """What the file must hold before new lines are added to it; None: it does."""
        self._new = ""

    def begin(self, step: int, num_steps: int) -> None:
        """Rewrite the file, less the lines after `step`; a run that goes on has not finished."""
        lines, num_bad = read_metrics(self._path)
        if num_bad:
            self._say(f"warning: {num_bad} damaged lines in {self._path} are left out")
        lines = [line for line in lines if line["step"] <= step]
        if step < num_steps:
            for line in lines:
                line.pop("event", None)
        self._earlier = "".join(json.dumps(line) + "\n" for line in lines)
        self._flush()

    def write(self, step: int, metrics: Metrics, event: str | None) -> None:
        """Append a line and hand it to the operating system.

        Raises:
            OSError: it cannot be written now; it waits for the next one.
        """
        # JSON knows no NaN and no infinity.
        known = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        line: dict[str, Any] = {"step": step, **known}
        if event:
            line["event"] = event
        self._new += json.dumps(line) + "\n"
        self._flush()

    def close(self) -> None:
        """Write what is waiting, and close the file.

        Raises:
            OSError: something could not be written.
        """
        try:
            self._flush()
        finally:
            self._file.close()

    def _flush(self) -> None:
        if self._earlier is not None:
            with replaced_whole(self._path) as temporary:
                temporary.write_text(self._earlier)
            self._earlier = None
        new, self._new = self._new, ""
        if new or self._file.is_waiting:
            self._file.append(new)
