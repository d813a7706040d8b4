"""What is predicted for a number of workers: step, throughput, and the time to the same loss. Pure functions."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from hvdtrain.optim.noise import steps_ratio
from hvdtrain.verbs.plan.facts import Facts, predict
from hvdtrain.verbs.plan.kinds import Layout, is_folded
from hvdtrain.verbs.plan.step import StepTime

# 1.64 standard deviations hold 90 % of a normal distribution.
_NINETY_PERCENT = 1.64
# What the model of the network is taken to be off by with each doubling of the ranks beyond those measured.
_BEYOND = 0.12
# What it is taken to be off by where MPI folds ranks to a power of two first: each MPI does that in its own way.
_FOLDED = 0.15
# The network's times differ from step to step, and from one use to another, by at least as much.
_LEAST = 0.15
# What computing alone is taken to be off by: no step has the surroundings of another.
_OF_COMPUTING = 0.04
# And what a format computes, measured without a step around it.
_OF_CODEC = 0.3
# The share of a pace that may be another one on other numbers of ranks.
_OF_PACE = 0.5


@dataclass(frozen=True)
class Row:
    """What is predicted for a number of workers."""

    workers: int
    step: StepTime
    error: float
    """Half the width of the 90 % interval of the step time, as a share of it."""
    units_per_s: float
    efficiency: float
    """Throughput per worker relative to one worker."""
    global_batch: int
    relative_steps: float | None
    """Steps to the same loss relative to one worker; None where the noise scale is not known."""
    relative_time: float | None
    """Time to the same loss relative to one worker."""
    time_low: float | None
    time_high: float | None
    hours: float | None
    """Of the recipe's whole training."""
    worker_hours: float | None
    cost: float | None

    @property
    def exposed_share(self) -> float:
        """Return the share of the step that waits for the network."""
        return self.step.exposed_s / self.step.total_s


def row_of(facts: Facts, workers: int) -> Row:
    """Return the step time and the throughput of so many workers; what is relative to one is not filled in yet."""
    step = predict(facts, workers)
    batch = facts.micro_batch_size * facts.accum_steps * workers
    per_s = batch * facts.units_per_sample / step.total_s
    return Row(workers, step, error_of(facts, workers, step, facts.pace), per_s, 1.0, batch, *[None] * 7)


def relative_to(first: Row, row: Row, facts: Facts, price: float | None) -> Row:
    """Return the row with efficiency, steps and time to the same loss relative to one worker's, hours and cost."""
    efficiency = row.units_per_s / row.workers / first.units_per_s
    if facts.noise is None:
        return replace(row, efficiency=efficiency)
    step = row.step.total_s / first.step.total_s

    def time_with(noise: float) -> float:
        return step * steps_ratio(noise, row.global_batch, first.global_batch)

    steps = steps_ratio(facts.noise.samples, row.global_batch, first.global_batch)
    # More noise makes large batches more useful.
    low, high = sorted((time_with(facts.noise.low), time_with(facts.noise.high)))
    hours = worker_hours = cost = None
    if facts.steps_to_target and facts.recipe_batch:
        at_recipe = steps_ratio(facts.noise.samples, row.global_batch, facts.recipe_batch)
        hours = facts.steps_to_target * at_recipe * row.step.total_s / 3600
        worker_hours = hours * row.workers
        cost = worker_hours * price if price is not None else None
    return replace(
        row,
        efficiency=efficiency,
        relative_steps=steps,
        relative_time=step * steps,
        time_low=low * (1 - row.error),
        time_high=high * (1 + row.error),
        hours=hours,
        worker_hours=worker_hours,
        cost=cost,
    )


def error_of(facts: Facts, workers: int, step: StepTime, pace: float = 1.0, codec_s: float = 0.0) -> float:
    """Return half the 90 % interval as a share: of what is computed, and of the network, wider where it is far away.

    Args:
        facts: what was measured.
        workers: of the prediction.
        step: predicted.
        pace: what real exchanges took to what single collectives tell: what is left of it in other steps is not known.
        codec_s: of that, what the format computes.
    """
    # The interquartile range of a normal distribution is 1.35 standard deviations.
    own = math.hypot(facts.spread / 1.35, _OF_COMPUTING, _OF_CODEC * codec_s / step.total_s)
    if workers == 1 or facts.network is None:
        return _NINETY_PERCENT * own
    layout = Layout.of(workers, facts.ranks_per_host)
    doublings = max(0.0, math.log2(workers / facts.network.most_ranks))
    folded = _FOLDED if is_folded(facts.network.controller, layout) else 0.0
    unsure = _OF_PACE * abs(math.log(pace))
    network = (
        math.hypot(_LEAST, facts.network.error, _BEYOND * doublings, folded, unsure) * step.exposed_s / step.total_s
    )
    return _NINETY_PERCENT * math.hypot(own, network)
