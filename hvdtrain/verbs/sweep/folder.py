"""The directory of a sweep.

sweep.json       what is trained, and the trials        trial-7/        the run of a trial
trials/7.toml    the settings of a trial                results.csv     the table, for programs
submit.sh        what was given to Slurm                results.json    the same, with what is best
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from hvdtrain.errors import ConfigError, DataError, ResumeError, reason_of
from hvdtrain.settings.files import replaced_whole
from hvdtrain.settings.untrusted import read_json
from hvdtrain.verbs.sweep.grid import Combination, binding

_NAME, _FORMAT = "sweep.json", 1


@dataclass
class Trial:
    """A run of a sweep."""

    number: int
    values: dict[str, Any]
    """Of the settings that differ, by name."""
    proposal: int | None = None
    """The number of Optuna's proposal."""
    why: str = ""
    """Why it has failed when it was last tried."""


@dataclass
class SweepFolder:
    """What a sweep's directory holds."""

    path: Path
    facts: dict[str, Any] = field(default_factory=dict)
    """What was asked for, and must not change: see `Grid.facts`."""
    metric: str = "val/loss"
    goal: str = "min"
    trials: list[Trial] = field(default_factory=list)
    slurm_job: str = ""
    """The array that was submitted last."""

    def run_dir(self, trial: Trial) -> Path:
        """Return the run directory of a trial."""
        return self.path / f"trial-{trial.number}"

    def settings_file(self, trial: Trial) -> Path:
        """Return the file with a trial's settings, which its `train` is given."""
        return self.path / "trials" / f"{trial.number}.toml"

    @property
    def names(self) -> list[str]:
        """Return the settings that differ."""
        return [*{name: None for trial in self.trials for name in trial.values}]

    def add(self, combination: Combination) -> Trial:
        """Return the trial of a combination, a new one if it was not there; its settings are written.

        Raises:
            ConfigError: they cannot be.
        """
        known = (trial for trial in self.trials if trial.values == combination.values)
        trial = next(known, None)
        if trial is None:
            trial = Trial(len(self.trials), combination.values, combination.proposal)
            self.trials.append(trial)
        file = self.settings_file(trial)
        self._write(file, tomli_w.dumps(combination.settings))
        return trial

    def save(self) -> None:
        """Write what is known of the trials.

        Raises:
            ConfigError: it cannot be written.
        """
        known = {name: value for name, value in asdict(self).items() if name != "path"}
        self._write(self.path / _NAME, json.dumps({"format": _FORMAT, **known}, indent=1) + "\n")

    def _write(self, file: Path, text: str) -> None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with replaced_whole(file) as temporary:
                temporary.write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{file} cannot be written ({reason_of(error)}): choose another --run-dir") from error


def is_sweep(path: Path) -> bool:
    """Return whether a directory is a sweep's."""
    return (path / _NAME).is_file()


def read_sweep(path: Path) -> SweepFolder:
    """Read the directory of a sweep.

    Raises:
        ResumeError: it is damaged, or written by a newer version.
    """
    file = path / _NAME
    try:
        values = read_json(file)
    except DataError as error:
        raise ResumeError(f"{error}: choose another --run-dir, or remove it to begin anew") from error
    if values.pop("format", None) != _FORMAT:
        raise ResumeError(f"{file} was written by another version of hvdtrain: choose another --run-dir")
    try:
        found = SweepFolder(path, trials=[Trial(**trial) for trial in values.pop("trials")], **values)
        _check(found)
    except (ValueError, TypeError, KeyError) as error:
        raise ResumeError(f"{file} is damaged: choose another --run-dir, or remove it to begin anew") from error
    return found


def _check(sweep: SweepFolder) -> None:
    """Raise ValueError where a sweep does not hold what one is written with."""
    texts = (sweep.metric, sweep.slurm_job, *(trial.why for trial in sweep.trials))
    is_good = all(isinstance(text, str) for text in texts) and sweep.goal in ("min", "max")
    is_good = is_good and isinstance(sweep.facts, dict)
    for place, trial in enumerate(sweep.trials):
        is_good = is_good and trial.number == place and isinstance(trial.values, dict)
        is_good = is_good and (trial.proposal is None or type(trial.proposal) is int)
    if not is_good:
        raise ValueError("a value of another type")


def open_sweep(path: Path, facts: Mapping[str, Any]) -> SweepFolder:
    """Return the sweep in a directory, new or as it was left.

    Raises:
        ResumeError: a sweep with other settings is there, or something that is no sweep.
    """
    if not is_sweep(path):
        _check_no_run(path)
        return SweepFolder(path, dict(facts))
    found = read_sweep(path)
    for name, wanted in facts.items():
        before = binding(found.facts.get(name))
        if before != wanted:
            was, now = _first_difference(before, wanted)
            raise ResumeError(
                f"{path} holds a sweep with another {_WORDS[name]} ({was}, now {now}): choose another --run-dir"
            )
    return found


_WORDS = {
    "recipe": "recipe",
    "fixed": "setting",
    "config": "--config",
    "search": "kind of search",
    "varied": "set of settings that differ",
}


def _first_difference(was: Any, now: Any) -> tuple[str, str]:
    if isinstance(was, dict) and isinstance(now, dict):
        name = next(name for name in {**was, **now} if was.get(name) != now.get(name))
        return f"{name} {_plain(was.get(name))}", _plain(now.get(name))
    return _plain(was), _plain(now)


def _plain(value: Any) -> str:
    if value is None:
        return "not given"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return " ".join(map(str, value))[:80] or "none"
    return str(value)[:80]


def _check_no_run(path: Path) -> None:
    if (path / "metrics.jsonl").exists() or (path / "checkpoints").exists():
        raise ResumeError(f"{path} holds a run, not a sweep: choose another --run-dir")
