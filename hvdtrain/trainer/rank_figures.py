"""Figures of each rank's steps, which travel to all ranks with the sums of metrics, in one collective."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hvdtrain.process.usage import most_bytes
from hvdtrain.trainer.stopwatch import OTHER, Lap
from hvdtrain.world import World

OWN_TIME = "time/own_s/rank-"
"""What the metrics of each rank's own time begin with; the rank follows."""


class RankFigures(NamedTuple):
    """Means of a step since the last line of metrics, on one rank."""

    step_s: float = 0.0
    own_s: float = 0.0
    """What the rank itself has to do: data, computing and update, without waiting for others and without logging."""
    data_s: float = 0.0
    """Of that, waiting for data."""
    cpu_s: float = 0.0
    """Processor time of the thread that trains."""
    switches: float = 0.0
    """How often a thread of the process had to leave its processor to somebody else."""
    samples: float = 0.0
    """Samples of the last step: ranks may have unequal parts."""
    host_bytes: float = 0.0
    """The most host memory that the process has held."""
    device_bytes: float = 0.0
    """The most memory of its GPU that it has held."""
    wait_s: float = 0.0
    """Waiting for averages that are still on the wire, for the network or for ranks that come later."""
    skipped: float = 0.0
    """Steps that were skipped."""


def figures_of(lap: Lap, samples: int, device: torch.device, skipped: int = 0) -> RankFigures:
    """Return this rank's figures."""
    split = lap.split
    own_s = sum(seconds for part, seconds in split.items() if part not in ("communication", OTHER))
    counts = lap.counts
    is_gpu = device.type == "cuda"
    return RankFigures(
        lap.step_s,
        own_s,
        split["data"],
        counts.get("cpu", 0.0),
        counts.get("switches", 0.0),
        samples,
        most_bytes(),
        torch.cuda.max_memory_allocated(device) if is_gpu else 0,
        split["communication"],
        skipped,
    )


def start_sums_and_figures(
    world: World, sums: Tensor, own: RankFigures
) -> Callable[[], tuple[list[float], list[RankFigures]]]:
    """Begin to add the ranks' `sums`, float64 `(n,)`. Collective.

    What it returns waits for the sums and for the figures of every rank, alike on all.

    The figures travel behind the sums: each rank leaves the others' places empty, so that a sum is what one has put in.
    """
    if world.size == 1:
        return lambda: (sums.tolist(), [own])
    width = len(own)
    places = torch.zeros(world.size, width, dtype=torch.float64)
    places[world.rank] = torch.tensor(own, dtype=torch.float64)
    flat = torch.cat([sums, places.flatten().to(sums.device)])
    wait = world.start_all_reduce(flat, "sum", "train.metrics")

    def arrived() -> tuple[list[float], list[RankFigures]]:
        numbers = wait().tolist()
        rows = [numbers[place : place + width] for place in range(len(sums), len(numbers), width)]
        return numbers[: len(sums)], [RankFigures(*row) for row in rows]

    return arrived


# Of more ranks a line would have more bytes of these than of everything else: then the median and the slowest tell.
_MOST_RANKS = 64


def metrics_of(lap: Lap, ranks: Sequence[RankFigures]) -> dict[str, float]:
    """Return what a line of metrics says of where time and memory go.

    The split is this rank's; of several ranks, what each has to do itself; memory is that of the rank with the most.
    """
    metrics = {f"time/{part}_s": seconds for part, seconds in lap.split.items()}
    if len(ranks) > 1:
        own = [rank.own_s for rank in ranks]
        metrics["time/own_median_s"], metrics["time/own_slowest_s"] = statistics.median(own), max(own)
        metrics["time/slowest_rank"] = own.index(max(own))
        for number, seconds in enumerate(own if len(own) <= _MOST_RANKS else ()):
            metrics[f"{OWN_TIME}{number:03}"] = float(f"{seconds:.4g}")
    for name in ("host_bytes", "device_bytes"):
        most = max((getattr(rank, name) for rank in ranks), default=0.0)
        if most:
            metrics[f"memory/{name}"] = most
    return metrics
