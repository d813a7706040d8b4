"""What a person should know when a run goes on."""

from __future__ import annotations

from collections.abc import Iterator

from hvdtrain.errors import counted
from hvdtrain.optim.schedule import learning_rate
from hvdtrain.trainer.job import Job

# Changes of the learning rate below this share are those of one step to the next.
_JUMP = 0.01


def resume_lines(job: Job, step: int, num_steps_then: int | None) -> Iterator[str]:
    """Yield from where a run goes on, and whether its learning rate jumps because it has another number of steps.

    Args:
        job: what is trained.
        step: of the checkpoint that was loaded.
        num_steps_then: steps that the run was to have when it was saved; None where that is not known.
    """
    if job.run is not None:
        yield f"continues at step {step:,} of {job.num_steps:,}, from {job.run.checkpoints.path_of(step)}"
    if num_steps_then is None or num_steps_then == job.num_steps or step >= job.num_steps:
        return
    optim = job.config.optim
    then, now = learning_rate(optim, step, num_steps_then), learning_rate(optim, step, job.num_steps)
    if abs(now - then) > _JUMP * then:
        yield (
            f"WARNING: the run was to have {counted(num_steps_then, 'step')} and has {job.num_steps:,} now: with the"
            f" schedule {optim.schedule} the learning rate jumps from {then * job.lr_factor:.3g} to"
            f" {now * job.lr_factor:.3g}. To keep it where it is: --optim.schedule constant"
            f" --optim.warmup-steps 0 --optim.peak-lr {then:.6g} --allow-config-change optim"
        )
