"""Whether a run may go on from a checkpoint: the settings and the data that it was begun with."""

from __future__ import annotations

import dataclasses
from typing import Any

from hvdtrain.data.fingerprint import Fingerprint
from hvdtrain.errors import ResumeError
from hvdtrain.settings import Config, changeable_settings, to_dict
from hvdtrain.settings.fields import fields_of, hints_of, is_optional
from hvdtrain.settings.values import flattened
from hvdtrain.trainer.job import Job
from hvdtrain.trainer.same_data import explain_resume

_MOST_NAMED = 5


def check_fits(job: Job, state: dict[str, Any], data: dict[str, Fingerprint]) -> None:
    """Make sure that a checkpoint belongs to the job's settings, batch and data.

    Args:
        job: what is to go on.
        state: of the checkpoint.
        data: what the data is known by now.

    Raises:
        ResumeError: it does not; names everything that differs.
    """
    now = flattened(to_dict(job.config))
    then = _with_later_settings(flattened(state["config"]), job.config)
    free = (*changeable_settings(job.config), *job.allowed_changes)
    different = [
        name for name in sorted(then.keys() | now.keys()) if then.get(name) != now.get(name) and not _is_in(name, free)
    ]
    _check_recipe(job, different)
    if then.get("optim.name") != now.get("optim.name"):
        raise ResumeError(
            f"{job.run} was begun with another optimizer: optim.name was {then.get('optim.name')} and is"
            f" {now.get('optim.name')} now. What one remembers is of no use to another, and no --allow-config-change"
            f" changes that: go on with the same one (--config {job.run.config}), or choose another --run-dir"
        )
    problems = [f"{name} was {then.get(name)} and is {now.get(name)} now" for name in different]
    if state["global_batch_size"] != job.plan.global_batch_size:
        problems.append(f"the global batch was {state['global_batch_size']} and is {job.plan.global_batch_size} now")
    change = explain_resume(job, state, data)
    if change:
        problems.append(change)
    if problems:
        raise ResumeError(
            f"{job.run} was begun with other settings: {'; '.join(problems)}. Go on with the same ones"
            f" (--config {job.run.config}), choose another --run-dir, or allow a change of what is not"
            " the batch or the model with --allow-config-change SECTION.SETTING"
        )


def _check_recipe(job: Job, different: list[str]) -> None:
    """Raise ResumeError where a checkpoint has settings that the job's recipe knows nothing of."""
    known = {name for name, _, _ in fields_of(job.config)}
    strange = [name for name in different if name not in known and not name.startswith("optim.")]  # each has its own
    if strange:
        more = f" and {len(strange) - _MOST_NAMED} more" if len(strange) > _MOST_NAMED else ""
        raise ResumeError(
            f"{job.run} is a run of another recipe, or of this one before it was changed, with settings that there are"
            f" not now ({', '.join(strange[:_MOST_NAMED])}{more}): choose another --run-dir"
        )


def _with_later_settings(then: dict[str, Any], config: Config) -> dict[str, Any]:
    """Add the settings that there were not yet when the checkpoint was written: at their defaults they change nothing.

    One that may be None is left out where it is None, so nothing can be said of it.
    """
    later = {
        name: item.default
        for name, item, section in fields_of(config)
        if name not in then and item.default is not dataclasses.MISSING
        if not is_optional(hints_of(type(section))[item.name])
    }
    return then | {name: list(value) if isinstance(value, tuple) else value for name, value in later.items()}


def _is_in(name: str, settings: tuple[str, ...]) -> bool:
    return any(name == setting or name.startswith(f"{setting}.") for setting in settings)
