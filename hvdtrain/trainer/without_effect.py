"""Settings that do nothing in this job, or less than they say, though they fit together: said at the start.

What has no effect beside other settings is refused before (`Section.unused`); here it depends on the ranks, the data,
the optimizer or the length of the run, with which the same settings may be right elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hvdtrain.data.readers import says_it_reads_ahead
from hvdtrain.errors import counted
from hvdtrain.process.launch import threads_per_rank
from hvdtrain.settings import Precision
from hvdtrain.settings.compression import EXACT, parse_compression
from hvdtrain.settings.fields import fields_of
from hvdtrain.trainer.due import is_due
from hvdtrain.trainer.fragments import Schedule
from hvdtrain.trainer.job import Job
from hvdtrain.trainer.precision import has_products, is_fast_in_bf16

_MOST_KEPT = 10_000  # multiples that are looked at
_FEW_WORKERS = 2  # a recipe may have so many by itself


def without_effect(job: Job) -> list[str]:
    """Return a line for each reason, with the settings that it concerns; none that are at their defaults."""
    return [
        *(*_alone(job), *_slow(job), *_adasum(job), *_too_short(job)),
        *(*_ahead(job), *_crowded(job), *_kept(job), *_offloaded(job)),
    ]


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


def _slow(job: Job) -> Iterator[str]:
    precision, device = job.config.train.precision, job.world.device
    if device.type == "cuda" and not is_fast_in_bf16(device):
        yield from _slow_on_old_card(precision, torch.cuda.get_device_name(device))
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "bf16-true": torch.bfloat16}.get(precision)
    if dtype is not None and device.type == "cpu" and not has_products(dtype):
        yield (
            f"precision:  {precision} makes products many times slower on this CPU, which has no instructions for them:"
            " fp32 is faster (--train.precision auto)"
        )


def _too_short(job: Job) -> Iterator[str]:
    """Yield a line where what travels between ranks, or when, would begin after the run's last step."""
    comm, steps = job.config.comm, job.num_steps
    if job.world.size == 1:
        return
    schedule, is_local = Schedule.of(comm), comm.sync == "local"
    if is_local and not schedule.ever_ends(steps):
        warmup = min(comm.sync_warmup_steps, steps)
        why = f"in {counted(steps, 'step')}{f', {warmup:,} of them warm-up' if warmup else ''}"
        yield (
            f"updates:    no effect of --comm.period {comm.period} and what belongs to it: {why}, no average of a"
            " period is taken but the mean at the end"
        )
    sent, what = (schedule.averages(steps), "average") if is_local else (steps, "step")
    if parse_compression(comm.compression)[0] not in EXACT and 0 < sent <= comm.compression_warmup_steps:
        yield (
            f"wire:       no effect of --comm.compression {comm.compression}: of the {counted(sent, what)} of this run"
            f" the first {comm.compression_warmup_steps:,} send everything as it is (--comm.compression-warmup-steps)"
        )


def _slow_on_old_card(precision: Precision, card: str) -> Iterator[str]:
    """Yield a line where a card that came before the A100 lacks what a precision needs."""
    if precision in ("bf16", "bf16-true"):
        yield (
            f"precision:  {precision} is slow on a {card}, which has no products for it, and its blocks are not"
            " compiled: --train.precision fp16 is what it is fast in"
        )
    if precision == "tf32":
        yield f"precision:  no effect of --train.precision tf32: a {card} has none, and multiplies fp32"


def _adasum(job: Job) -> Iterator[str]:
    if job.config.comm.op != "adasum" or job.world.size == 1:
        return
    limit = job.config.train.max_grad_norm
    if limit is not None:
        yield (
            f"adasum:     the combined gradient is clipped to a norm of {limit:g}: the more ranks disagree, the sooner"
            " (--train.max-grad-norm none: never)"
        )
    if _is_blind_to_length(job):
        yield (
            f"adasum:     little effect with {job.config.optim.name}, whose steps depend on a gradient's direction but"
            " not on its length: --optim.name sgd takes longer steps where ranks disagree"
        )


def _is_blind_to_length(job: Job) -> bool:
    """Return whether the optimizer takes the same steps with gradients of four times the length."""

    def moved(scale: float) -> Tensor:
        model = torch.nn.Linear(4, 3, bias=False)
        with torch.no_grad():
            model.weight.copy_(torch.linspace(-1, 1, 12).view(3, 4))
        before = model.weight.detach().clone()
        optimizer = job.task.build_optimizer(job.config.optim, model)
        for _ in range(3):
            model.weight.grad = before.cos() * scale
            optimizer.step()
        return model.weight.detach() - before

    try:
        once, again = moved(1.0), moved(4.0)
    except Exception:  # an optimizer of the user's own may want the whole model
        return False
    return bool((again - once).norm() < 0.01 * once.norm())


def _ahead(job: Job) -> Iterator[str]:
    reading, data = job.reading, job.task.train_data
    if reading.workers and getattr(data, "is_sequential", False):
        yield "reading:    no effect of --data.workers: a stream is read by each rank itself, one sample after another"
    if reading.ahead and not reading.workers and not says_it_reads_ahead(data):
        kind = type(getattr(data, "data", data)).__name__
        yield f"reading:    no effect of --data.ahead: {kind} is not read by threads; give --data.workers"


def _crowded(job: Job) -> Iterator[str]:
    """Yield a line where a rank's workers are more than the cores that are its share of the host."""
    workers, cores = job.reading.workers, threads_per_rank(max(1, job.world.local_size))
    if workers > max(_FEW_WORKERS, cores) and not getattr(job.task.train_data, "is_sequential", False):
        yield (
            f"reading:    {workers} --data.workers are more than this rank's share of the host's cores, {cores}: they"
            " take turns with each other, with training and with the other ranks, and no more is read than by as many"
        )


def _kept(job: Job) -> Iterator[str]:
    keep, saves = job.config.checkpoint.keep_every, (job.config.checkpoint.every, job.config.eval.every)
    kept = range(keep, min(job.num_steps, keep * _MOST_KEPT) + 1, keep) if keep else ()
    if keep and job.num_steps % keep and not any(is_due(job, step, every) for step in kept for every in saves):
        yield f"saving:     no effect of --checkpoint.keep-every {keep}: nothing is saved at a multiple of it"


def _offloaded(job: Job) -> Iterator[str]:
    if job.config.optim.offload == "cpu" and not job.is_offloaded:
        yield "offload:    no effect of --optim.offload cpu: without a GPU all state lies in host memory"
