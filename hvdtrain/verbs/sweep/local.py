"""The trials of a sweep on this machine, one after the other, each as a `train` of its own."""

from __future__ import annotations

import os
import shlex
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from hvdtrain.errors import ConfigError, StopRequested
from hvdtrain.process.job import run_job
from hvdtrain.process.stop import StopRequest
from hvdtrain.process.working_directory import module_command
from hvdtrain.settings.units import shortened
from hvdtrain.verbs.kit import write_line
from hvdtrain.verbs.options import SweepOptions
from hvdtrain.verbs.sweep.folder import SweepFolder, Trial
from hvdtrain.verbs.sweep.grid import Grid, label_of
from hvdtrain.verbs.sweep.proposals import propose
from hvdtrain.verbs.sweep.results import result_of, results_of

_LAST_LINES = 40


@dataclass
class Ended:
    """How the trials went."""

    num_failed: int = 0
    num_stopped: int = 0
    """Trials that were asked to stop by somebody else, or by their --train.max-time."""
    stopped_by: str = ""
    """Why the sweep itself was stopped."""


def train_trials(grid: Grid, sweep: SweepFolder, options: SweepOptions) -> Ended:
    """Train what has not finished; a trial that fails does not keep the others from it.

    A signal is passed on to the trial that runs, which saves; then the sweep ends.

    Raises:
        LaunchError: ranks cannot be started.
    """
    ended = Ended()
    with StopRequest(None) as request:
        for place, trial in enumerate(_trials(grid, sweep)):
            if result_of(sweep, trial).state == "finished":
                continue
            if request.reason:
                break
            of = f" of {len(sweep.trials)}" if grid.combinations else ""
            say(f"--- trial {trial.number} ({place + 1}{of}): {label_of(trial.values, trial.values)}")
            lines: deque[str] = deque(maxlen=_LAST_LINES)
            if trial.why:  # of an earlier try, and no news of this one
                trial.why = ""
                sweep.save()
            code = _train(grid.recipe_name, sweep, trial, options, request, lines)
            if request.reason:
                break
            _note(sweep, trial, code, lines, ended)
        ended.stopped_by = request.reason or ""
    return ended


def _trials(grid: Grid, sweep: SweepFolder) -> Iterator[Trial]:
    """Yield the trials of the sweep; those that are proposed when those before them have ended."""
    yield from [trial for trial in sweep.trials if trial.proposal is None or grid.combinations]
    for number in range(grid.options.sweep__optuna or 0):
        own = [trial for trial in sweep.trials if trial.proposal == number]
        if not own:
            words = propose(grid, number, results_of(sweep))
            own = [sweep.add(one) for one in grid.with_seeds(words, number)]
            sweep.save()
        yield from own


def _train(
    recipe: str, sweep: SweepFolder, trial: Trial, options: SweepOptions, request: StopRequest, lines: deque[str]
) -> int:
    command = [*module_command("hvdtrain"), "train", recipe]
    command += ["--config", str(sweep.settings_file(trial)), "--run-dir", str(sweep.run_dir(trial))]

    def show(line: str) -> None:
        lines.append(line)
        say(line.rstrip("\n"))

    return run_job(
        options.np, command, show, starter=starter_of(options), is_to_stop=lambda: request.reason is not None
    )


def starter_of(options: SweepOptions) -> list[str] | None:
    """Return the words of --launcher; None: without one.

    Raises:
        ConfigError: it is no command.
    """
    launcher = options.launcher
    if launcher is None:
        return None
    try:
        words = shlex.split(launcher)
    except ValueError as error:
        raise ConfigError(f"--launcher {shortened(launcher)!r} has a quotation mark too few") from error
    if not words:
        raise ConfigError("--launcher is empty: give a command such as mpirun -np 4")
    return words


def _note(sweep: SweepFolder, trial: Trial, code: int, lines: deque[str], ended: Ended) -> None:
    """Note how a trial has ended, and say it where it has not finished."""
    has_finished = result_of(sweep, trial).state == "finished"
    if has_finished and code:
        say(f"--- trial {trial.number} has finished, and ended with exit code {code}: {_last_words(lines)}")
    elif code == 0 and not has_finished:
        ended.num_failed += 1
        trial.why = f"what has started it returned 0, but the run has not finished: {_last_words(lines)}"
        say(f"--- trial {trial.number} has failed: {trial.why}; the others go on")
    elif code == StopRequested.exit_code:
        ended.num_stopped += 1
        say(f"--- trial {trial.number} was stopped and has saved; the others go on")
    elif code:
        ended.num_failed += 1
        trial.why = f"exit code {code}: {_last_words(lines)}"
        say(f"--- trial {trial.number} has failed, {trial.why}; the others go on")
    sweep.save()


def _last_words(lines: deque[str]) -> str:
    """Return what a trial has said last: its own message, where it had one, not its launcher's."""
    own = [line for line in lines if "hvdtrain: " in line]
    said = own or [line for line in lines if line.strip()]
    return said[-1].strip()[:300] if said else "it said nothing"


def say(text: str) -> None:
    """Print a line; a reader that is gone, as `head`, ends no sweep, nor does a disk that is full."""
    try:
        write_line(text, sys.stdout)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # python flushes once more at its end
