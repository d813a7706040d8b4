"""The loop: `fit` decides when to log, evaluate, save and stop; `step.train_step` takes one optimizer step.

Steps drive the loop and every collective is reached by every rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from hvdtrain.errors import StopRequested, on_all_ranks
from hvdtrain.process.run_files import lacks_its_end
from hvdtrain.process.stop import StopRequest
from hvdtrain.trainer.announced import announced
from hvdtrain.trainer.device_clock import progress_of
from hvdtrain.trainer.due import is_due
from hvdtrain.trainer.evaluation import evaluate
from hvdtrain.trainer.job import Job
from hvdtrain.trainer.line import Lines
from hvdtrain.trainer.lone_samples import check_lone_samples
from hvdtrain.trainer.resumed import resume_lines
from hvdtrain.trainer.saver import Saver
from hvdtrain.trainer.state import Training, replicated_tensors, start_training
from hvdtrain.trainer.step import train_step
from hvdtrain.trainer.stopwatch import Stopwatch, counts_of
from hvdtrain.world import Asking


@dataclass
class _Run:
    """What belongs together while `fit` runs."""

    job: Job
    training: Training
    stopwatch: Stopwatch
    saver: Saver
    lines: Lines
    request: StopRequest
    ended: str = ""
    """Why a component has ended the run before its last step."""


def fit(job: Job, begin: Callable[[], None] = lambda: None) -> dict[str, float]:
    """Train to the last step, from `run_dir`'s newest checkpoint on, and return the last evaluation. Collective.

    The model is left with the weights that were evaluated.

    `begin` is called on every rank when nothing is refused any more, before the first step.

    Raises:
        UsageError: on all ranks alike, before the first step: settings, data and checkpoint do not fit together.
        StopRequested: on all ranks alike, after saving: a signal reached any rank, or the time is used up.
        DivergedError: on all ranks alike: too many steps in a row had a loss or gradient that is not finite, or the
            ranks' weights are no longer equal.
        CheckpointError: on all ranks alike: the last save failed.
    """
    training = start_training(job)
    check_lone_samples(job, training)
    for line in announced(training.rates, training.components):
        job.log.say(line)
    for line in resume_lines(job, training.step, training.num_steps_then) if training.step else ():
        job.log.say(line)
    job.world.progress = progress_of(job.world)
    stopwatch, evaluated = Stopwatch(training.step, partial(counts_of, job.world)), {}
    begin()
    job.log.begin(training.step, job.num_steps)
    ended = training.reason_to_end(job.world, is_evaluated=True) if training.step else ""
    if (ended or training.step >= job.num_steps) and not training.is_evaluation_due:
        because = f": {ended}" if ended else ""
        job.log.say(f"this run has finished before, at step {training.step}{because}")
        evaluated = evaluate(job, training)
        if lacks_its_end(job.run.path):  # it was killed between its last save and its last line
            job.log.write(training.step, evaluated, "finished")
        training.strategy.end(job.world, training)
        training.use_evaluated_weights()
        return evaluated
    with training, Saver(job) as saver, StopRequest(job.config.train.max_time_s) as request:
        lines = Lines(job, training, stopwatch, saver)
        run = _Run(job, training, stopwatch, saver, lines, request)
        asking = Asking(job.world, training.optimizer)
        if training.is_evaluation_due:
            run.ended = ended
            evaluated = _evaluate_and_save(run, is_stop=False)
        training.is_unchecked = True
        while training.step < job.num_steps and not run.ended:
            asking.ask(request.reason is not None, training.strategy.busy_until(training) - training.step)
            train_step(job, training)
            is_stop = asking.answer()
            run.ended = training.reason_to_end(job.world, is_evaluated=False)
            lines.after_step(asking.steps, training.step == job.num_steps or bool(run.ended))
            evaluated = _evaluate_and_save(run, is_stop)
        asking.close()
        saver.finish()
        job.world.progress.leave()
    if run.ended:
        job.log.say(f"ended at step {training.step} of {job.num_steps}: {run.ended}")
    last = {**evaluated, **saver.metrics(), "time/train_s": stopwatch.seconds}
    job.log.write(training.step, last, "finished")
    training.strategy.end(job.world, training)
    training.use_evaluated_weights()
    return evaluated


def _evaluate_and_save(run: _Run, is_stop: bool) -> dict[str, float]:
    """Do after a step what is due; returns the evaluation, empty if there was none. Collective.

    The order is what makes a stop cheap and a checkpoint worth its name. Evaluation comes before the save, so that the
    save knows what its weights reached; a request to stop cuts it short, because whoever asked may not wait, and the
    checkpoint then says that it is still due: the run makes up for it when it goes on, before its next step. At the end
    the weights are saved before the evaluation too, with the evaluation due: one that raises must not cost the
    training. Weights that reach a lower held-out loss than all before them are saved, due or not: `best` names the best
    evaluation. The check that ranks are equal comes before each save, so that what is saved is never one rank's own.
    Nothing here is asked of one rank alone: `is_stop` is what all have agreed on.
    """
    job, training = run.job, run.training
    step, is_last = training.step, training.step == job.num_steps or bool(run.ended)
    is_evaluating = is_last or is_due(job, step, job.config.eval.every)
    evaluated: dict[str, float] = {}
    was_due, training.is_evaluation_due = training.is_evaluation_due, is_evaluating
    is_saved = is_due(job, step, job.config.checkpoint.every)
    is_checked = is_due(job, step, job.config.health.replica_check_every)
    if not (is_evaluating or is_stop or is_saved or is_checked):
        return evaluated
    run.lines.finish()
    with run.stopwatch.paused():
        training.before_looking()
        for line in training.structure.news(training):
            job.log.say(line)
        if is_last and not was_due:
            _save(run, evaluated)
        if is_evaluating and not is_stop:
            evaluated = evaluate(job, training, run.request)
        training.is_evaluation_due = is_evaluating and not evaluated
        if evaluated:
            run.ended = _after_evaluation(run, evaluated)
            is_last = is_last or bool(run.ended)
        is_stop = is_stop or training.is_evaluation_due
        if evaluated and not is_last:
            job.log.write(step, evaluated)
        is_saving = is_stop or is_best(training, evaluated) or is_saved
        if evaluated if is_last else is_saving:
            _save(run, evaluated)
        elif is_checked:
            _check_replicas(job, training)
    if is_stop and (not is_last or training.is_evaluation_due):
        run.saver.finish()
        raise stopped(job, step, run.request)
    return evaluated


def _after_evaluation(run: _Run, evaluated: Mapping[str, float]) -> str:
    """Let the components act on an evaluation; returns why they end the run, if they do. Collective."""
    for component in run.training.components:
        component.after_evaluation(run.training, evaluated)
    return run.ended or run.training.reason_to_end(run.job.world, is_evaluated=True)


def _save(run: _Run, evaluated: dict[str, float]) -> None:
    if run.job.config.health.replica_check_every is not None:
        _check_replicas(run.job, run.training)
    run.saver.save(run.training, evaluated, beside=True)


def _check_replicas(job: Job, training: Training) -> None:
    """Make sure that ranks which should be equal now are. Collective.

    Raises:
        DivergedError: they are not.
    """
    job.world.check_replicas(replicated_tensors(training, with_optimizer=False), "training")


def stopped(job: Job, step: int, request: StopRequest) -> StopRequested:
    """Return the exception that ends all ranks alike; names the reason of the first rank that has one. Collective."""
    reasons = job.world.all_gather_object(request.reason, "stop.reason")
    rank, reason = next((rank, reason) for rank, reason in enumerate(reasons) if reason)
    return on_all_ranks(
        StopRequested(
            f"stopped at step {step} of {job.num_steps} on request ({reason}, rank {rank}) and saved in {job.run}:"
            " the same command with this --run-dir goes on"
        )
    )


def is_best(training: Training, evaluated: Mapping[str, float]) -> bool:
    """Note the held-out loss of an evaluation; returns whether it is the lowest of the run."""
    before = training.best_loss
    training.best_loss = min(before, evaluated.get("val/loss", math.inf))
    return training.best_loss < before
