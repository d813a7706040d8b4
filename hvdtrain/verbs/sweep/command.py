"""The verb `sweep`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from hvdtrain.errors import HvdtrainError, LaunchError, StopRequested, counted
from hvdtrain.process.launch import detect_launch
from hvdtrain.process.output import tell
from hvdtrain.process.stray import stray_hint
from hvdtrain.rundir.lock import claim
from hvdtrain.verbs.options import SweepOptions
from hvdtrain.verbs.sweep.folder import SweepFolder, open_sweep
from hvdtrain.verbs.sweep.grid import Grid, label_of
from hvdtrain.verbs.sweep.local import Ended, say, starter_of, train_trials
from hvdtrain.verbs.sweep.proposals import check_optuna
from hvdtrain.verbs.sweep.results import counts_of, results_of, summary_of, table_of, write_results
from hvdtrain.verbs.sweep.slurm import array_command, check_slurm, submit, waiting_tasks


def sweep(grid: Grid, options: SweepOptions) -> int:
    """Answer `sweep RECIPE`; returns the exit code.

    0: every trial has finished; 1: some have failed; 75: stopped on request, or some trials were.

    Raises:
        ConfigError: what is asked for cannot be had here.
        ResumeError: the directory holds another sweep, or another process works there.
        LaunchError: this process is one of several ranks, or Slurm refuses.
    """
    launch = detect_launch()
    if launch.is_parallel:
        raise LaunchError(
            f"sweep starts the ranks of its trials itself, and {launch.launcher} has started it: run it alone, with -np"
            f" 4 or with --launcher{stray_hint(launch)}"
        )
    if options.sweep__optuna:
        check_optuna()
    found = open_sweep(grid.run_dir, grid.facts)
    found.metric, found.goal = options.sweep__metric, options.sweep__goal
    starter_of(options)
    if options.slurm:
        check_slurm(found, options)
    if options.dry_run:
        return _dry_run(grid, found, options)
    with _held(found):
        found = open_sweep(grid.run_dir, grid.facts)  # as whoever held it before has left it
        found.metric, found.goal = options.sweep__metric, options.sweep__goal
        for combination in grid.combinations:
            found.add(combination)
        found.save()
        _say_beginning(grid, found)
        if options.slurm:
            return _submit(grid, found, options)
        try:
            ended = train_trials(grid, found, options)
        except KeyboardInterrupt:
            raise HvdtrainError(
                f"the sweep was interrupted at once: the same command goes on in {found.path}"
            ) from None
        return _conclude(found, ended)


@contextlib.contextmanager
def _held(sweep: SweepFolder) -> Iterator[None]:
    held = claim(sweep.path)
    try:
        yield
    finally:
        held.release()


def _say_beginning(grid: Grid, sweep: SweepFolder) -> None:
    what = counts_of(results_of(sweep)) if sweep.trials else "nothing was trained yet"
    if grid.options.sweep__optuna:
        what += f", {counted(grid.options.sweep__optuna, 'proposal')} in all"
    say(f"sweep of {grid.recipe_name} in {sweep.path}: {what}")


def _dry_run(grid: Grid, sweep: SweepFolder, options: SweepOptions) -> int:
    """Print the trials; nothing is written."""
    lines = [label_of(one.values, one.values) for one in grid.combinations]
    if not lines:
        say(f"sweep of {grid.recipe_name}: {counted(options.sweep__optuna or 0, 'proposal')} of Optuna's, one by one")
        return 0
    say(f"sweep of {grid.recipe_name} in {sweep.path}: {counted(len(lines), 'trial')}")
    for line in lines:
        say(f"  {line}")
    if options.slurm:
        say(f"by: {' '.join(array_command(sweep, grid.recipe_name, sweep.trials, options))}")
    return 0


def _submit(grid: Grid, sweep: SweepFolder, options: SweepOptions) -> int:
    results = results_of(sweep)
    left = [one.trial for one in results if one.state != "finished"]
    num_waiting = waiting_tasks(sweep.slurm_job)
    if left and not num_waiting:
        sweep.slurm_job = submit(sweep, grid.recipe_name, left, options)
        sweep.save()
        say(
            f"submitted {counted(len(left), 'trial')} as array {sweep.slurm_job}: the same command, or report"
            f" {sweep.path}, shows how they go"
        )
        return 0
    _show(sweep)
    if num_waiting:
        say(f"{counted(num_waiting, 'trial')} of array {sweep.slurm_job} wait or run: nothing was submitted")
    return 0


def _show(sweep: SweepFolder) -> None:
    """Print the table and what is best, and write both."""
    results = results_of(sweep)
    write_results(sweep, results)
    for line in table_of(sweep, results) if results else ():
        say(line)
    for line in summary_of(sweep, results) if results else ():
        say(line)
    say(f"{counts_of(results)}; {sweep.path}/results.csv has the table, report {sweep.path} the curves")


def _conclude(sweep: SweepFolder, ended: Ended) -> int:
    _show(sweep)
    if ended.stopped_by:
        raise StopRequested(
            f"the sweep was stopped on request ({ended.stopped_by}): the same command goes on in {sweep.path}"
        )
    if ended.num_failed:
        tell(f"hvdtrain: {counted(ended.num_failed, 'trial')} of the sweep failed; see above")
        return 1
    return StopRequested.exit_code if ended.num_stopped else 0
