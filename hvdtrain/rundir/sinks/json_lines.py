"""The sink of programs: `metrics.jsonl`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, TextIO

from hvdtrain.rundir.directory import RunDirectory
from hvdtrain.rundir.sinks.sink import Metrics


class JsonLines:
    """Writes `RUN_DIR/metrics.jsonl`: one JSON object a line.

    On resume, lines of steps that the checkpoint does not have are dropped: the run goes through them again.
    """

    def __init__(self, run: RunDirectory) -> None:
        self._path = run.metrics
        self._file: TextIO | None = None

    def begin(self, step: int, num_steps: int) -> None:
        """Open the file, less the lines after `step`; a run that goes on has not finished."""
        lines = [line for line in read_lines(self._path) if line["step"] <= step]
        if step < num_steps:
            for line in lines:
                line.pop("event", None)
        temporary = self._path.with_suffix(".writing")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
        temporary.replace(self._path)
        self._file = self._path.open("a")

    def write(self, step: int, metrics: Metrics, event: str | None) -> None:
        """Append a line and hand it to the operating system."""
        assert self._file is not None, "begin() comes first"
        # JSON knows no NaN and no infinity.
        known = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        line: dict[str, Any] = {"step": step, **known}
        if event:
            line["event"] = event
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file:
            self._file.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the file's complete lines; a last one cut short by a crash is dropped."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
