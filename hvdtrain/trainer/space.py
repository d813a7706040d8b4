"""Whether the disk has room for the checkpoints to come: said before the first step, not by a save that fails."""

from __future__ import annotations

import shutil

from hvdtrain.models.private_torch import FakeTensorMode
from hvdtrain.settings.paths import existing_parent
from hvdtrain.settings.units import in_units
from hvdtrain.trainer.due import times_due
from hvdtrain.trainer.fakes import fake_model
from hvdtrain.trainer.job import Job
from hvdtrain.trainer.memory import component_bytes, optimizer_bytes, tensor_bytes

# The state of an optimizer is seldom more than so many times the weights.
_MOST_STATE = 8


def checkpoint_bytes(job: Job) -> int:
    """Return about how large a checkpoint will be: weights, the optimizer's state of all ranks, components' states.

    What codecs and local updates remember comes on top. Nothing is allocated; takes about a second.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    model = fake_model(job, mode, False)
    with mode:
        weights = tensor_bytes([*model.parameters(), *model.buffers()])
    return weights + sum(optimizer_bytes(job, model).values()) + component_bytes(job, model, mode)


def kept_at_once(job: Job) -> int:
    """Return how many checkpoints there are at the most: those that are kept, the best, and one being written."""
    config, evaluated = job.config.checkpoint, job.config.eval.every
    saves = times_due(job, config.every) + times_due(job, evaluated) - 1
    if config.keep_last is None:
        return saves
    apart = len(range(config.keep_every, job.num_steps + 1, config.keep_every)) if config.keep_every else 0
    return min(saves, config.keep_last + apart + (evaluated is not None) + 1)


def space_warning(job: Job) -> list[str]:
    """Return a line where the disk's free space does not do for the checkpoints to come, else nothing.

    Quotas of a person or a project are not seen. For the rank that writes.
    """
    folder = existing_parent(job.run.path)
    try:
        to_come = max(1, kept_at_once(job) - len(job.run.checkpoints.by_step()))
        total, _, free = shutil.disk_usage(folder)
        rough = tensor_bytes([*job.task.model.parameters(), *job.task.model.buffers()]) * (1 + _MOST_STATE)
        if total == 0 or rough * to_come < free:  # some file systems tell nothing
            return []
        size = checkpoint_bytes(job)
    except Exception:  # of any type: a user's own optimizer may do what cannot be done on a few numbers
        return []
    if size * to_come <= free:
        return []
    kept = "all are kept: --checkpoint.keep-last" if job.config.checkpoint.keep_last is None else "so many are kept"
    return [
        f"warning:    a checkpoint takes about {in_units(size)}, and {folder} has {in_units(free)} free, for"
        f" {free // size:,} of the {to_come:,} to come ({kept}): make room, or choose another --run-dir"
    ]
