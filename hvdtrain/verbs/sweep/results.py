"""What the trials of a sweep have come to: a row each, and what is best over their seeds."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hvdtrain.errors import ConfigError, counted, reason_of
from hvdtrain.rundir.metrics import read_metrics
from hvdtrain.settings.files import replaced_whole
from hvdtrain.settings.units import duration
from hvdtrain.verbs.sweep.folder import SweepFolder, Trial
from hvdtrain.verbs.sweep.grid import SEED, label_of, short_label, shown

State = Literal["finished", "failed", "begun", "waiting"]


@dataclass(frozen=True)
class Result:
    """A trial and what it has reached."""

    trial: Trial
    run_dir: str
    state: State
    step: int = 0
    """Optimizer steps completed."""
    final: float | None = None
    """The metric of the last evaluation; None where there was none, or it was not finite."""
    best: float | None = None
    """The best of all evaluations."""
    best_step: int | None = None
    seconds: float | None = None
    """Of training, of a run that has finished."""
    metrics: tuple[str, ...] = ()
    """Names of what was evaluated."""


@dataclass(frozen=True)
class Group:
    """The trials of a sweep that differ in their seed only."""

    values: dict[str, Any]
    mean: float | None
    """Of the final metric of trials that have finished."""
    std: float | None
    """Of a sample, with n - 1; None for fewer than two."""
    n: int
    """Trials that have finished, with a metric that is finite."""
    of: int
    """Trials."""


def results_of(sweep: SweepFolder) -> list[Result]:
    """Return what each trial has come to."""
    return [result_of(sweep, trial) for trial in sweep.trials]


def result_of(sweep: SweepFolder, trial: Trial) -> Result:
    """Return what a trial has come to, by the metrics in its run directory."""
    run_dir = sweep.run_dir(trial)
    try:
        lines, _ = read_metrics(run_dir / "metrics.jsonl")
    except OSError:
        lines = []
    has_finished = bool(lines) and lines[-1].get("event") == "finished"
    begun: State = "failed" if trial.why else "begun" if (run_dir / "config.toml").exists() else "waiting"
    evaluated = [(line["step"], _finite(line[sweep.metric])) for line in lines if sweep.metric in line]
    best = [(value, step) for step, value in evaluated if value is not None]
    chosen: tuple[float | None, int | None] = (None, None)
    if best:
        chosen = min(best) if sweep.goal == "min" else max(best, key=lambda pair: (pair[0], -pair[1]))
    seconds = _finite(lines[-1].get("time/train_s")) if has_finished else None
    return Result(
        trial,
        str(run_dir),
        "finished" if has_finished else begun,
        lines[-1]["step"] if lines else 0,
        evaluated[-1][1] if evaluated else None,
        chosen[0],
        chosen[1],
        seconds,
        tuple(sorted({name for line in lines for name in line if name.startswith("val/")})),
    )


def _finite(value: Any) -> float | None:
    try:
        number = float(value) if type(value) in (int, float) else math.nan
    except OverflowError:  # digits without end, in a file that is damaged
        return None
    return number if math.isfinite(number) else None


def groups_of(sweep: SweepFolder, results: Sequence[Result]) -> list[Group]:
    """Return the settings by their mean over seeds, the best first; those without a result last."""
    found: dict[str, list[Result]] = {}
    for result in results:
        own = {name: value for name, value in result.trial.values.items() if name != SEED}
        found.setdefault(json.dumps(own, sort_keys=True), []).append(result)
    groups = []
    for members in found.values():
        numbers = [one.final for one in members if one.state == "finished" and one.final is not None]
        groups.append(
            Group(
                {name: value for name, value in members[0].trial.values.items() if name != SEED},
                statistics.fmean(numbers) if numbers else None,
                statistics.stdev(numbers) if len(numbers) > 1 else None,
                len(numbers),
                len(members),
            )
        )
    sign = 1 if sweep.goal == "min" else -1
    return sorted(groups, key=lambda group: (group.mean is None, sign * (group.mean or 0.0)))


def rows_of(sweep: SweepFolder, results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return the table: a dictionary for each trial, all with the same keys."""
    return [
        {
            "trial": one.trial.number,
            **{name: one.trial.values.get(name) for name in sweep.names},
            "state": one.state,
            "step": one.step,
            sweep.metric: one.final,
            f"best {sweep.metric}": one.best,
            "best step": one.best_step,
            "seconds": one.seconds,
            "run_dir": one.run_dir,
        }
        for one in results
    ]


def write_results(sweep: SweepFolder, results: Sequence[Result]) -> None:
    """Write results.csv and results.json.

    Raises:
        ConfigError: they cannot be written.
    """
    rows, text = rows_of(sweep, results), io.StringIO()
    writer = csv.DictWriter(text, [*rows[0]] if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _in_csv(value) for name, value in row.items()} for row in rows)
    groups = [vars(group) for group in groups_of(sweep, results)]
    values = {"metric": sweep.metric, "goal": sweep.goal, "best_first": groups, "trials": rows}
    try:
        for name, content in (("results.csv", text.getvalue()), ("results.json", json.dumps(values, indent=1) + "\n")):
            with replaced_whole(sweep.path / name) as temporary:
                temporary.write_text(content, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{sweep.path} cannot be written ({reason_of(error)}): choose another --run-dir") from error


def _in_csv(value: Any) -> Any:
    return value if value is None or (isinstance(value, int | float) and not isinstance(value, bool)) else shown(value)


def table_of(sweep: SweepFolder, results: Sequence[Result]) -> list[str]:
    """Return the lines of the table of trials."""
    names = sweep.names
    heads = ["trial", *(short_label(name, names) for name in names)]
    heads += ["state", "step", sweep.metric, "best", "at step", "time", "run"]
    rows = [
        [
            str(one.trial.number),
            *(shown(one.trial.values.get(name)) for name in names),
            one.state,
            f"{one.step:,}",
            _number(one.final),
            _number(one.best),
            "-" if one.best_step is None else f"{one.best_step:,}",
            "-" if one.seconds is None else duration(one.seconds),
            one.run_dir,
        ]
        for one in results
    ]
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in [heads, *rows]]


def summary_of(sweep: SweepFolder, results: Sequence[Result]) -> list[str]:
    """Return the lines that say which settings are best, and how far their seeds are apart."""
    groups = groups_of(sweep, results)
    if all(group.mean is None for group in groups):
        known = sorted({name for one in results for name in one.metrics})
        instead = f"; evaluated were {', '.join(known)}: --sweep.metric" if known and sweep.metric not in known else ""
        return [f"no trial has finished with a {sweep.metric} that is finite{instead}"]
    names = [name for name in sweep.names if name != SEED]
    lines = [f"{sweep.metric} at the end, by settings, the best first:"]
    for group in groups:
        what = label_of(group.values, names) or "all"
        spread = "" if group.std is None else f" +- {group.std:.2g} (std)"
        said = "no result" if group.mean is None else f"{group.mean:.5g}{spread}"
        missing = f" of {group.of}" if group.n < group.of else ""
        lines.append(f"  {what}: {said}, n = {group.n}{missing}")
    return lines


def counts_of(results: Sequence[Result]) -> str:
    """Return "6 trials: 4 finished, 1 failed, 1 waiting"."""
    states: list[State] = ["finished", "failed", "begun", "waiting"]
    parts = [f"{sum(one.state == state for one in results)} {state}" for state in states]
    return f"{counted(len(results), 'trial')}: {', '.join(part for part in parts if not part.startswith('0 '))}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.5g}"
