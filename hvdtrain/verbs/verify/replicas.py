"""Checks that ranks are bitwise equal: at the start, after going on from a checkpoint, at the end. Collective."""

from __future__ import annotations

import dataclasses
import math

from torch import Tensor

from hvdtrain.errors import DivergedError
from hvdtrain.rundir.directory import RunDirectory
from hvdtrain.trainer.saver import Saver
from hvdtrain.trainer.state import replicated_tensors, start_training
from hvdtrain.trainer.step import train_step
from hvdtrain.verbs.verify.compare import Difference, between, bitwise, in_bits, movement, worst_of
from hvdtrain.verbs.verify.nature import Nature
from hvdtrain.verbs.verify.table import Row, judged
from hvdtrain.verbs.verify.trial import Run, Trial

# What is a coincidence between two runs of the same command; a lost momentum is more than a thousand times that.
_TIMES_AS_USUAL = 10.0


def check_start(nature: Nature) -> list[Row]:
    """1: all ranks are bitwise equal before the first step, as built and after the broadcast."""
    trial, name = nature.own, "ranks are equal at the start"
    built = {key: tensor.detach() for key, tensor in trial.task.model.state_dict().items()}
    try:
        trial.world.check_replicas(built, "verify.built")
    except DivergedError as error:
        advice = "build() must return the same weights on every rank: seed what it draws from self.train.seed"
        return [Row(1, name, "FAIL", "not as built", advice=f"{error}; {advice}")]
    try:
        start_training(trial.job(trial.world))
    except DivergedError as error:
        return [Row(1, name, "FAIL", "not after the broadcast", advice=f"{error}; the ranks' state was not broadcast")]
    return [Row(1, name, "pass", f"{len(built)} tensors, bitwise", value=0.0)]


def check_resume(nature: Nature) -> tuple[list[Row], Run]:
    """6: save, load and go on is bitwise the same as not stopping. Also returns the run that did not stop."""
    own, name = nature.own, "save, load, go on = not stopping"
    whole = own.together()
    job = own.job(own.world)
    job = dataclasses.replace(job, directory=RunDirectory(own.folder / "resume"))
    training = start_training(job)
    train_step(job, training)
    with Saver(job) as saver:
        saver.save(training, {})
        saver.finish()
    job = dataclasses.replace(own.job(own.world), directory=RunDirectory(own.folder / "resume"))
    resumed = start_training(job)
    for _ in range(resumed.step, own.steps):
        train_step(job, resumed)
    difference, rank = worst_of(own.world, bitwise(whole, replicated_tensors(resumed)), "resume")
    if resumed.step != whole.training.step:
        difference = Difference(float("inf"), float("inf"), "the step counter")
    advice = f"first seen in {difference.name} on rank {rank}: something that matters is not in the checkpoint"
    if difference.absolute and math.isfinite(difference.absolute) and own.world.device.type != "cpu":
        return [_as_close_as_any_two(own, whole, replicated_tensors(resumed), name, advice)], whole
    return [judged(6, name, difference, 0.0, advice, in_bits(difference))], whole


def _as_close_as_any_two(own: Trial, whole: Run, resumed: dict[str, Tensor], name: str, advice: str) -> Row:
    """Judge a run on GPUs that has gone on by what two runs that did not stop differ by: see 8. Collective."""
    again = replicated_tensors(own.together().training)
    theirs, scale = replicated_tensors(whole.training), movement(whole)
    usual, _ = worst_of(own.world, between(again, theirs, scale), "again.usual")
    difference, _ = worst_of(own.world, between(resumed, theirs, scale), "resume.usual")
    figure = f"{difference}; two identical runs {usual.relative:.1e}"
    return judged(6, name, difference, _TIMES_AS_USUAL * usual.relative, advice, figure)


def check_end(nature: Nature, whole: Run) -> list[Row]:
    """7: ranks are bitwise equal at the end."""
    name = "ranks are equal at the end"
    tensors = replicated_tensors(whole.training)
    try:
        nature.own.world.check_replicas(tensors, "verify.end")
    except DivergedError as error:
        return [Row(7, name, "FAIL", "not equal", advice=f"{error}; something is not averaged over the ranks")]
    return [Row(7, name, "pass", f"{len(tensors)} tensors, bitwise", value=0.0)]
