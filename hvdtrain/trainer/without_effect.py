"""Settings that do nothing in this job, though they fit together: said at the start, so that nobody waits for them.

What has no effect beside other settings is refused before (`Section.unused`); here it depends on the ranks, the data or
the length of the run, with which the same settings may be right elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator

from hvdtrain.data.readers import says_it_reads_ahead
from hvdtrain.settings.fields import fields_of
from hvdtrain.trainer.due import is_due
from hvdtrain.trainer.job import Job

_MOST_KEPT = 10_000  # multiples that are looked at


def without_effect(job: Job) -> list[str]:
    """Return a line for each reason, with the settings that it concerns; none that are at their defaults."""
    return [*_alone(job), *_ahead(job), *_kept(job)]


def _alone(job: Job) -> Iterator[str]:
    if job.world.size > 1:
        return
    names = [
        f"--{name.replace('_', '-')}"
        for name, item, section in fields_of(job.config)
        if item.metadata.get("several_ranks") and getattr(section, item.name) != item.default
    ]
    if names:
        yield f"one rank:   no effect here of {', '.join(names)}"


def _ahead(job: Job) -> Iterator[str]:
    reading, data = job.reading, job.task.train_data
    if reading.workers and getattr(data, "is_sequential", False):
        yield "reading:    no effect of --data.workers: a stream is read by each rank itself, one sample after another"
    if reading.ahead and not reading.workers and not says_it_reads_ahead(data):
        kind = type(getattr(data, "data", data)).__name__
        yield f"reading:    no effect of --data.ahead: {kind} is not read by threads; give --data.workers"


def _kept(job: Job) -> Iterator[str]:
    keep, saves = job.config.checkpoint.keep_every, (job.config.checkpoint.every, job.config.eval.every)
    kept = range(keep, min(job.num_steps, keep * _MOST_KEPT) + 1, keep) if keep else ()
    if keep and job.num_steps % keep and not any(is_due(job, step, every) for step in kept for every in saves):
        yield f"saving:     no effect of --checkpoint.keep-every {keep}: nothing is saved at a multiple of it"
