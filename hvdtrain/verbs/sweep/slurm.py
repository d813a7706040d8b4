"""The trials of a sweep as an array of Slurm jobs: each task is a run of its own, by the job file for runs."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from hvdtrain.errors import ConfigError, LaunchError, reason_of
from hvdtrain.settings.files import replaced_whole
from hvdtrain.verbs.options import SweepOptions
from hvdtrain.verbs.sweep.folder import SweepFolder, Trial

_PATIENCE_S = 60.0


def array_command(sweep: SweepFolder, recipe: str, trials: Sequence[Trial], options: SweepOptions) -> list[str]:
    """Return the command that submits trials; their numbers are those of the array's tasks, `%a` in the arguments."""
    numbers = ",".join(str(trial.number) for trial in trials)
    settings = sweep.path.resolve() / "trials" / "%a.toml"
    recipe = str(Path(recipe).resolve()) if recipe.endswith(".py") else recipe
    return [
        *("sbatch", "--parsable", f"--array={numbers}", f"--job-name={sweep.path.name}"),
        *shlex.split(options.sbatch),
        *(str(options.slurm_file), "train", recipe, "--config", str(settings)),
    ]


def check_slurm(sweep: SweepFolder, options: SweepOptions) -> None:
    """Raise ConfigError where an array cannot be submitted from here."""
    if shutil.which("sbatch") is None:
        raise ConfigError("--slurm submits by sbatch, which is not found here: run this where Slurm's commands are")
    if not options.slurm_file.is_file():
        raise ConfigError(
            f"--slurm-file {options.slurm_file} is not there: name your copy of hvdtrain's launch/slurm.sbatch, edited"
            " for your cluster"
        )
    if "%" in str(sweep.path.resolve()):
        raise ConfigError(f"{sweep.path} has a % in its path, which means something to Slurm: choose another --run-dir")
    try:
        shlex.split(options.sbatch)
    except ValueError as error:
        raise ConfigError(f"--sbatch {options.sbatch!r} has a quotation mark too few") from error


def waiting_tasks(job: str) -> int:
    """Return how many tasks of an array are still waiting or running.

    Raises:
        LaunchError: Slurm does not say.
    """
    squeue = shutil.which("squeue")
    if not job or squeue is None:
        return 0
    done = _done([squeue, "--noheader", "--array", f"--jobs={job}", "--format=%i"])
    if done.returncode and "invalid job id" not in done.stderr.lower():  # which it says of jobs that have long ended
        said = " ".join((done.stderr or done.stdout).split())[-500:]
        raise LaunchError(
            f"squeue does not say whether array {job} still waits or runs ({said or f'exit code {done.returncode}'}):"
            " nothing was submitted; try again"
        )
    return 0 if done.returncode else len(done.stdout.split())


def submit(sweep: SweepFolder, recipe: str, trials: Sequence[Trial], options: SweepOptions) -> str:
    """Write submit.sh and run it; returns the number of the array.

    Raises:
        ConfigError: the file cannot be written.
        LaunchError: Slurm refuses.
    """
    command = array_command(sweep, recipe, trials, options)
    # The run directory of a task, in which the job file puts its number for %a.
    run_dir = sweep.path.resolve() / "trial-%a"
    script = sweep.path / "submit.sh"
    lines = [
        "#!/bin/sh",
        "# Submits trials of this sweep. Written by hvdtrain.",
        f"export HVDTRAIN_RUN_DIR={shlex.quote(str(run_dir))}",
        f"cd {shlex.quote(str(Path.cwd()))} && exec {shlex.join(command)}",
    ]
    try:
        with replaced_whole(script) as temporary:
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{script} cannot be written ({reason_of(error)}): choose another --run-dir") from error
    done = _done(["/bin/sh", str(script)])
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())[-500:]
        raise LaunchError(f"Slurm refuses the array ({said or f'exit code {done.returncode}'}): see {script}")
    last = (done.stdout.strip().splitlines() or [""])[-1].partition(";")[0]
    if not (last.isascii() and last.isdecimal()):
        raise LaunchError(
            f"sbatch has printed {last[:60]!r} where the number of the array belongs: look by squeue whether it was"
            f" submitted, and for what {script} starts"
        )
    return last


def _done(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a command of Slurm's.

    Raises:
        LaunchError: it cannot be started, or does not answer.
    """
    try:
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_PATIENCE_S,
            check=False,
        )
    except OSError as error:
        raise LaunchError(f"{command[0]} cannot be started: {reason_of(error)}") from error
    except subprocess.TimeoutExpired as error:
        raise LaunchError(
            f"Slurm has not answered for {_PATIENCE_S:g} s: look whether it has taken the array"
        ) from error
