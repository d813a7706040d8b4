"""Checks of what must outlive an evaluation and a restart: modules' modes, all of `state_dict()`. Collective."""

from __future__ import annotations

import dataclasses

from torch import Tensor, nn

from hvdtrain.errors import counted, listed
from hvdtrain.rundir.directory import RunDirectory
from hvdtrain.trainer import Job
from hvdtrain.trainer.evaluation import evaluate
from hvdtrain.trainer.saver import Saver
from hvdtrain.trainer.state import start_training
from hvdtrain.trainer.step import train_step
from hvdtrain.verbs.verify.nature import Nature
from hvdtrain.verbs.verify.table import Row
from hvdtrain.verbs.verify.trial import Trial
from hvdtrain.world import digest_of


def check_kept(nature: Nature) -> list[Row]:
    """10: an evaluation and a restart leave modes as they were; 11: `state_dict()` is what a checkpoint restores."""
    own = nature.own
    job = _job(own)
    training = start_training(job)
    begun = _modes(training.model)
    train_step(job, training)
    trained = _modes(training.model)
    evaluate(job, training)
    after = _modes(training.model)
    with Saver(job) as saver:
        saver.save(training, {})
        saver.finish()
    saved = training.model.state_dict()
    resumed = start_training(_job(own))
    changed = _changed(trained, after) or _changed(after, _modes(resumed.model))
    when = "after an evaluation" if _changed(trained, after) else "after a restart"
    return [_modes_row(begun, changed, when), _state_row(saved, resumed.model.state_dict())]


def _job(own: Trial) -> Job:
    """Return a job that saves, and evaluates the few samples of the trial: that is quick."""
    job = own.job(own.world)
    task = dataclasses.replace(job.task, val_data=job.task.train_data, evaluations=())
    return dataclasses.replace(job, task=task, directory=RunDirectory(own.folder / "kept"))


def _modes_row(begun: dict[str, bool], changed: list[str], when: str) -> Row:
    name = "modules stay in their modes"
    frozen = sum(not is_training for is_training in begun.values())
    if changed:
        advice = f"{listed(changed, most=3)}: in another mode {when}, so that it trains in another way from then on"
        return Row(10, name, "FAIL", f"{len(changed)} not, {when}", advice=advice, value=float(len(changed)))
    figure = f"{counted(len(begun), 'module')}, {frozen} in eval mode"
    return Row(10, name, "pass", figure, value=0.0)


def _state_row(saved: dict[str, object], restored: dict[str, object]) -> Row:
    name = "state_dict() is what a checkpoint restores"
    wrong = [key for key in {**saved, **restored} if not _is_same(saved.get(key), restored.get(key))]
    if wrong:
        advice = f"{listed(wrong, most=3)}: not what it was before the save: the model's hooks or extra state lose it"
        return Row(11, name, "FAIL", f"{counted(len(wrong), 'key')} not", advice=advice, value=float(len(wrong)))
    return Row(11, name, "pass", f"{counted(len(saved), 'key')}, bitwise", value=0.0)


def _is_same(one: object, other: object) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and int(digest_of(one)) == int(digest_of(other))
    return type(one) is type(other) and (isinstance(one, Tensor) or str(one) == str(other))


def _modes(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


def _changed(before: dict[str, bool], after: dict[str, bool]) -> list[str]:
    return [name or "the model" for name, is_training in before.items() if after.get(name) != is_training]
