"""Batch arithmetic: `micro_batch_size x accum_steps x world size = global_batch_size`."""

from __future__ import annotations

from dataclasses import dataclass

from hvdtrain.errors import ConfigError, counted
from hvdtrain.settings.sections import TrainConfig


@dataclass(frozen=True)
class BatchPlan:
    """`micro_batch_size x accum_steps x world_size = global_batch_size`, settled."""

    global_batch_size: int
    micro_batch_size: int
    accum_steps: int
    world_size: int
    largest_micro_batch_size: int | None = None
    """What memory is known to hold, where a run that goes on has smaller ones; None: it has not gone on."""

    def __str__(self) -> str:
        return (
            f"{self.micro_batch_size} samples x {self.accum_steps} accumulation x"
            f" {counted(self.world_size, 'rank')}"
            f" = global batch {self.global_batch_size}"
        )


def plan_batch(train: TrainConfig, world_size: int) -> BatchPlan:
    """Settle the batch arithmetic: any two of the three settings fix the third; alone, the global batch is not split.

    Raises:
        ConfigError: the numbers do not divide or do not agree; the message names numbers that would.
    """
    total, micro, accum = train.global_batch_size, train.micro_batch_size, train.accum_steps
    if total is None:
        if micro is None:
            raise ConfigError("give --train.global-batch-size or --train.micro-batch-size")
        accum = accum or 1
        return BatchPlan(micro * accum * world_size, micro, accum, world_size)
    if micro is not None and accum is not None and micro * accum * world_size != total:
        raise ConfigError(
            f"--train.micro-batch-size {micro} x --train.accum-steps {accum} x {counted(world_size, 'rank')}"
            f" = {micro * accum * world_size}, not --train.global-batch-size {total}: leave one of the three out"
        )
    name, given = ("micro-batch-size", micro) if micro is not None else ("accum-steps", accum or 1)
    unit = given * world_size
    if total % unit:
        split = f" with --train.{name} {given}" if given > 1 else ""
        raise ConfigError(
            f"the global batch of {total} samples does not divide among {world_size} ranks{split}:"
            f" set --train.global-batch-size to a multiple of {unit}, such as {_multiples_beside(total, unit)}"
        )
    other = total // unit
    micro, accum = (given, other) if micro is not None else (other, given)
    return BatchPlan(total, micro, accum, world_size)


def keep_batch(train: TrainConfig, world_size: int, total: int, largest_micro: int) -> BatchPlan:
    """Split the global batch of a run that goes on, on however many ranks.

    A micro-batch is as large as memory is known to hold, or as `train` asks for; accumulation does the rest. How often
    the run has gone on before, and on how many ranks, makes no difference: it would be another run in the last bits.

    Raises:
        ConfigError: it does not divide among the ranks; the message names numbers of ranks that would do.
    """
    if total % world_size:
        fits = [n for n in range(1, total + 1) if total % n == 0]
        near = sorted(sorted(fits, key=lambda n: abs(n - world_size))[:4])
        raise ConfigError(
            f"the run's global batch of {total} samples does not divide among {world_size} ranks:"
            f" go on with {', '.join(map(str, near[:-1]))} or {near[-1]}"
        )
    share = total // world_size
    limit = train.micro_batch_size or largest_micro
    micro = max(n for n in range(1, min(limit, share) + 1) if share % n == 0)
    accum = train.accum_steps
    if train.micro_batch_size is None and accum and share % accum == 0 and share // accum <= limit:
        micro = share // accum
    return BatchPlan(total, micro, share // micro, world_size, largest_micro_batch_size=limit)


def _multiples_beside(total: int, unit: int) -> str:
    below, above = total // unit * unit, (total // unit + 1) * unit
    return f"{below} or {above}" if below else str(above)
