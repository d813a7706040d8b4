"""What a dry run adds to what a run says: what decides it and is not seen otherwise before it ends."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from hvdtrain.data.stream import ENDLESS
from hvdtrain.errors import counted
from hvdtrain.optim.groups import trainable
from hvdtrain.optim.schedule import learning_rate, warmup_steps
from hvdtrain.settings.intervals import Every, parse_every
from hvdtrain.settings.units import in_units
from hvdtrain.trainer import Job
from hvdtrain.trainer.due import times_due
from hvdtrain.trainer.memory import Memory, estimate, wire_bytes
from hvdtrain.trainer.resumed import resume_lines
from hvdtrain.trainer.same_data import compare_data
from hvdtrain.trainer.saved_state import checked_state
from hvdtrain.verbs.greeting import num_trained
from hvdtrain.world import codec_for


def going_on(job: Job) -> list[str]:
    """Return from where the run would go on, if there is something in its directory. Collective.

    Raises:
        UsageError: on all ranks alike: it would be refused.
    """
    data = compare_data(job)
    said: list[str] = []

    def look() -> None:
        found = job.run.newest_outline(said.append)
        if found is not None:
            manifest, state = found
            state = checked_state(job, state, manifest, data)
            said.extend(resume_lines(job, manifest.step, state.get("num_steps")))

    job.world.together(lambda: look() if job.world.rank == 0 else None, "outline")
    return said


def details(job: Job, memory: Memory) -> str:
    """Return when what happens, the parameters by shape, the memory of a rank and what it sends."""
    named = job.task.model.named_parameters()
    shapes = Counter((re.sub(r"\.\d+\.", ".*.", name), tuple(parameter.shape)) for name, parameter in named)
    lines = [*_course(job), *(f"  {count:>4} x {name} {shape}" for (name, shape), count in shapes.items())]
    lines += [f"memory:     {memory}", _network(job)]
    if 0 < num_trained(job) < sum(p.numel() for p in trainable(job.task.model)):
        whole = estimate(job, all_trained=True)
        lines.append(
            f"frozen:     were nothing frozen, it would be {in_units(whole.total)} a rank and"
            f" {in_units(wire_bytes(job, all_trained=True))} of gradients"
        )
    return "\n".join(lines)


def _course(job: Job) -> Iterator[str]:
    """Yield what happens when."""
    config = job.config
    optim, limit = config.optim, config.train.max_grad_norm
    clipped = "no gradient is clipped" if limit is None else f"gradients are clipped to a norm of {limit:g}"
    decay = f"weight decay {optim.weight_decay:g}" if optim.weight_decay else "no weight decay"
    yield f"schedule:   learning rate {_rates(job)}; {decay}; {clipped}"
    held_out = len(job.task.val_data)
    samples = "a stream" if held_out >= ENDLESS else counted(held_out, "sample")
    yield f"held out:   {samples}, evaluated {_when(job, config.eval.every)}"
    kept, every = config.checkpoint.keep_last, config.checkpoint.keep_every
    which = "all" if kept is None else f"the newest {kept}" if kept > 1 else "the newest"
    more = f", those of multiples of {every:,}" if every else ""
    best = "" if kept is None else f"{more} and the best"
    yield f"saved:      {_when(job, config.checkpoint.every)}; {which}{best} are kept"
    trackers = ", ".join(name for name in ("tensorboard", "wandb", "mlflow") if getattr(config.log, name))
    yield f"lines:      after {_every(config.log.every)}{trackers and f', also to {trackers}'}"
    if config.train.max_time is not None:
        yield f"time:       saves and stops {config.train.max_time} after the launcher was started (--train.max-time)"


def _rates(job: Job) -> str:
    """Return the learning rate of the first and last step, of the end of the warm-up and of the middle."""
    optim, num_steps = job.config.optim, job.num_steps
    places = sorted({0, max(0, warmup_steps(optim, num_steps) - 1), num_steps // 2, num_steps - 1})
    of_steps = {step: f"{learning_rate(optim, step, num_steps) * job.lr_factor:.3g}" for step in places}
    if len({*of_steps.values()}) == 1:
        listed = f"{of_steps[0]} in every step"
    else:
        listed = ", ".join(f"{rate} in step {step + 1:,}" for step, rate in of_steps.items())
    return f"{listed}, unless evaluations lower it" if optim.schedule == "plateau" else listed


def _when(job: Job, every: Every | None) -> str:
    """Return after which steps something happens that happens at the end, too."""
    times = times_due(job, every)
    if every is None or times == 1:
        return "after the last step"
    return f"after {_every(every)} and the last, {counted(times, 'time')}"


def _every(every: Every) -> str:
    interval = parse_every("every", every, seconds=True)
    if interval.unit == "seconds":
        return f"every {interval.number:g} s or so"
    unit = interval.unit.removesuffix("s")
    return f"every {unit}" if interval.number == 1 else f"every {interval.number:,g} {unit}s"


def _network(job: Job) -> str:
    size, gradients = job.world.size, wire_bytes(job)
    sent = in_units(codec_for(job.config.comm).link_bytes(gradients, size))
    comm, what, when = job.config.comm, "gradients", "a step"
    if comm.sync == "local" and size > 1:
        what, when = "updates", "a step" if comm.period == 1 else f"every {comm.period:,} steps"
    if job.config.optim.shard and size > 1:
        what, when = "gradients, and as many of weights", "in all a step"
    return f"network:    {in_units(gradients)} of {what}; in a ring each rank sends {sent} {when}"
