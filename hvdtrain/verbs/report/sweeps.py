"""Sweeps in a report: each trial is a run, by the values that tell it apart; above them stands what is best."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hvdtrain.errors import ConfigError
from hvdtrain.verbs.report.runs import ReadRun, read_run, read_runs
from hvdtrain.verbs.report.shell import escape
from hvdtrain.verbs.report.tables import plain_table
from hvdtrain.verbs.sweep.folder import SweepFolder, is_sweep, read_sweep
from hvdtrain.verbs.sweep.grid import SEED, label_of, short_label, shown
from hvdtrain.verbs.sweep.results import Result, counts_of, groups_of, results_of


def read_with_sweeps(paths: Sequence[Path]) -> tuple[list[ReadRun], str]:
    """Return the runs in directories of runs and of sweeps, and HTML that says what the sweeps have come to.

    Raises:
        ConfigError: one of them is neither, or no trial of a sweep has begun.
        ResumeError: the file that says what a sweep trains is damaged.
    """
    alone = [path for path in paths if not is_sweep(path)]
    runs = read_runs(alone) if alone else []
    parts = []
    for path in paths:
        if is_sweep(path):
            sweep = read_sweep(path)
            results = results_of(sweep)
            runs += _runs_of(sweep, results, f"{path.resolve().name}: " if len(paths) > 1 else "")
            parts.append(_section(sweep, results))
    return runs, "".join(parts)


def _runs_of(sweep: SweepFolder, results: Sequence[Result], prefix: str) -> list[ReadRun]:
    runs = []
    for result in results:
        name = prefix + label_of(result.trial.values, result.trial.values)
        if result.state != "waiting" and Path(result.run_dir).is_dir():
            try:
                run = read_run(Path(result.run_dir), name)
            except ConfigError:  # it was refused before it wrote anything
                continue
            if result.trial.why and result.state != "finished":
                run.notes.insert(0, f"{name} has failed: {result.trial.why}")
            runs.append(run)
    if not runs:
        raise ConfigError(f"no trial of the sweep in {sweep.path} has begun: there is nothing to show yet")
    return runs


def _section(sweep: SweepFolder, results: Sequence[Result]) -> str:
    names = [name for name in sweep.names if name != SEED]
    heads = [*(short_label(name, sweep.names) for name in names), f"{sweep.metric} at the end, mean"]
    heads += ["standard deviation", "trials that finished", "of"]
    rows = [
        [
            *(shown(group.values.get(name)) for name in names),
            "" if group.mean is None else f"{group.mean:.5g}",
            "" if group.std is None else f"{group.std:.2g}",
            group.n,
            group.of,
        ]
        for group in groups_of(sweep, results)
    ]
    about = "the lowest first" if sweep.goal == "min" else "the highest first"
    return (
        f"<h2>Sweep {escape(sweep.path.resolve().name)}</h2><p>{escape(counts_of(results))}; {about}, over seeds.</p>"
        f"{plain_table(heads, rows, 'Settings of the sweep, the best first')}"
    )
