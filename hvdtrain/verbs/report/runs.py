"""A run as its directory tells it. A crash may have left anything there: what cannot be read is named, not hidden."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvdtrain.errors import ConfigError, ResumeError, reason_of
from hvdtrain.process.run_files import runs_in
from hvdtrain.rundir.directory import RunDirectory
from hvdtrain.rundir.metrics import each_line
from hvdtrain.settings.values import flat
from hvdtrain.verbs.report.rank_log import Record, read_records

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Floats = NDArray[np.float64]

_MOST_BYTES = 1 << 22
# Steps above this are no steps: floating point could not tell them from their neighbours.
_MOST_STEPS = 1 << 53
# Metrics of one run beyond these are left out, and said so.
_MOST_METRICS = 400


@dataclass(frozen=True)
class Curve:
    """A metric by step."""

    steps: Floats
    """Optimizer steps completed, shape `(n,)`, ascending."""
    values: Floats
    """Shape `(n,)`; NaN where what was logged was not finite."""


@dataclass
class ReadRun:
    """What a run's directory holds of it."""

    name: str
    path: Path
    curves: dict[str, Curve] = field(default_factory=dict)
    """By the metric's name, in the order of their first lines."""
    events: list[tuple[int, str]] = field(default_factory=list)
    """Step and name, such as "finished", of the lines of metrics that carry one."""
    saves: list[int] = field(default_factory=list)
    """Steps of the checkpoints that are kept."""
    settings: dict[str, Any] = field(default_factory=dict)
    """By full name, such as `train.steps`."""
    environment: dict[str, Any] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    """What rank 0 has logged for people."""
    notes: list[str] = field(default_factory=list)
    """What could not be read, in sentences."""

    @property
    def last_step(self) -> int:
        """Return the last step that a line of metrics is of; 0 without any."""
        return int(max((curve.steps.max() for curve in self.curves.values()), default=0))

    def last(self, metric: str) -> float | None:
        """Return the last value of a metric; None where none was logged."""
        curve = self.curves.get(metric)
        return None if curve is None else float(curve.values[-1])


def read_runs(paths: Sequence[Path]) -> list[ReadRun]:
    """Read runs, each by a name of its own: that of its directory, with the folders above it where names are equal.

    Raises:
        ConfigError: one of them is no directory of a run.
    """
    names = _names(paths)
    return [read_run(path, name) for path, name in zip(paths, names, strict=True)]


def read_run(path: Path, name: str | None = None) -> ReadRun:
    """Read what a run's directory holds.

    Raises:
        ConfigError: it is no directory of a run.
    """
    directory = RunDirectory(path)
    if not path.is_dir():
        raise ConfigError(f"{path} is no directory: name the directory of a run, such as runs/lm")
    known = (directory.metrics, directory.config, directory.environment, directory.checkpoints.folder)
    if not any(file.exists() for file in known):
        raise ConfigError(f"{path} holds no run: there are neither metrics.jsonl nor config.toml in it{runs_in(path)}")
    run = ReadRun(name or _names([path])[0], path)
    _read_metrics(directory.metrics, run)
    run.settings = flat(_read_file(directory.config, tomllib.loads, run))
    run.environment = _read_file(directory.environment, json.loads, run)
    try:
        run.saves = [*directory.checkpoints.by_step()]
    except ResumeError as error:
        run.notes.append(str(error))
    with contextlib.suppress(FileNotFoundError):
        try:
            run.records = read_records(directory.rank_log(0))
        except OSError as error:
            if isinstance(error, FileNotFoundError):
                raise
            run.notes.append(f"{directory.rank_log(0)} cannot be read ({reason_of(error)})")
    return run


def _names(paths: Sequence[Path]) -> list[str]:
    whole = [path.resolve().parts for path in paths]
    for length in range(1, max(map(len, whole)) + 1):
        names = ["/".join(parts[-length:]) for parts in whole]
        if len(set(names)) == len({*whole}):
            break
    if len(set(names)) < len(names):  # the same run, twice
        names = [f"{name} ({i})" for i, name in enumerate(names, 1)]
    return names


def _read_metrics(file: Path, run: ReadRun) -> None:
    columns: dict[str, _Column] = {}
    left_out: set[str] = set()
    num_bad = 0
    try:
        for line in each_line(file):
            if line is None or not 0 <= line["step"] < _MOST_STEPS:
                num_bad += 1
                continue
            if "event" in line:
                run.events.append((line["step"], str(line["event"])[:80]))
            left_out.update(_add(line, columns))
    except OSError as error:
        run.notes.append(f"{file} cannot be read ({reason_of(error)})")
    else:
        if not file.exists():
            run.notes.append(f"{file} is missing: nothing was logged yet")
        elif not columns:
            run.notes.append(f"{file} holds no line of metrics yet")
    run.curves = {name: _ascending(np.array(steps), np.array(values)) for name, (steps, values) in columns.items()}
    if num_bad:
        lines_are = "line is" if num_bad == 1 else "lines are"
        run.notes.append(f"{num_bad} {lines_are} damaged in {file}; the others are shown")
    if left_out:
        run.notes.append(f"{len(left_out)} of {len(left_out) + _MOST_METRICS} metrics in {file} are left out")


# Steps and values. Of a hundred thousand lines of many ranks, Python's own numbers would fill the memory.
_Column = tuple["array[float]", "array[float]"]


def _add(line: Mapping[str, Any], columns: dict[str, _Column]) -> Iterator[str]:
    """Add a line's numbers to the columns; yields the names of those that are too many."""
    for name, value in line.items():
        if name in ("step", "event") or not (value is None or type(value) in (int, float)):
            continue
        if name not in columns and len(columns) >= _MOST_METRICS:
            yield name
            continue
        steps, values = columns.setdefault(name, (array("d"), array("d")))
        steps.append(line["step"])
        values.append(_finite(value))


def _ascending(steps: Floats, values: Floats) -> Curve:
    """Return a curve; of several values of one step the last one, as of a run that went over it again."""
    if (np.diff(steps) > 0).all():
        return Curve(steps, values)
    order = np.argsort(steps, kind="stable")
    steps, values = steps[order], values[order]
    is_last = np.append(np.diff(steps) > 0, True)
    return Curve(steps[is_last], values[is_last])


def _finite(value: float | None) -> float:
    try:
        number = math.nan if value is None else float(value)
    except OverflowError:
        return math.nan
    return number if math.isfinite(number) else math.nan


def _read_file(file: Path, parse: Callable[[str], Any], run: ReadRun) -> dict[str, Any]:
    """Return what a file holds, and note why where that is nothing."""
    try:
        if file.exists() and not file.is_file():
            raise OSError(0, "it is no regular file")
        with file.open("rb") as opened:
            found = parse(opened.read(_MOST_BYTES).decode())
    except FileNotFoundError:
        run.notes.append(f"{file} is missing")
    except OSError as error:
        run.notes.append(f"{file} cannot be read ({reason_of(error)})")
    except (ValueError, RecursionError):
        run.notes.append(f"{file} is damaged and left out")
    else:
        if isinstance(found, dict):
            return found
        run.notes.append(f"{file} is damaged and left out")
    return {}
