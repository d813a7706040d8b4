"""The time of a training step on any number of ranks: what is computed, what is sent meanwhile, what is waited for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hvdtrain.verbs.plan.network import Layout, Network


@dataclass(frozen=True)
class Compute:
    """What one rank does in a step, seconds."""

    forward_s: float
    backward_s: float
    rest_s: float
    """Data, optimizer and everything else."""

    @property
    def total_s(self) -> float:
        """Return the time of a step without any other rank."""
        return self.forward_s + self.backward_s + self.rest_s

    def scaled(self, factor: float) -> Compute:
        """Return it with every part so many times as long."""
        return Compute(self.forward_s * factor, self.backward_s * factor, self.rest_s * factor)


@dataclass(frozen=True)
class Bucket:
    """Gradients that travel together."""

    ready: float
    """When the last of them is there, as a share of the backward pass."""
    num_bytes: int


@dataclass(frozen=True)
class StepTime:
    """A predicted step, seconds."""

    total_s: float
    exposed_s: float
    """Communication that training waits for."""
    latency_s: float
    """Of that, what better latency would save at most."""
    bandwidth_s: float
    """Of that, what better bandwidth would save at most."""


def exposed_communication(compute: Compute, buckets: Sequence[Bucket], seconds: Callable[[int], float]) -> float:
    """Return how long a step waits for the network after its backward pass.

    Buckets leave in turn, each when it is ready and the one before has arrived.

    Args:
        compute: gives the time of the backward pass.
        buckets: in the order in which they become ready.
        seconds: of an all-reduce of so many bytes.
    """
    done = 0.0
    for bucket in buckets:
        done = max(done, bucket.ready * compute.backward_s) + seconds(bucket.num_bytes)
    return max(0.0, done - compute.backward_s)


def step_time(
    compute: Compute,
    buckets: Sequence[Bucket],
    network: Network | None,
    layout: Layout,
    *,
    interference: float = 0.0,
    pace: float = 1.0,
    accum_steps: int = 1,
) -> StepTime:
    """Return the time of a step.

    Args:
        compute: of one micro-batch, the optimizer included.
        buckets: of the gradients.
        network: of the ranks; None for one rank.
        layout: of the ranks.
        interference: the share of hidden communication that slows computing down by as much, as where ranks compute on
            the cores that also move the bytes; measured.
        pace: factor of the network's times.
        accum_steps: micro-batches before each all-reduce.
    """
    more = (accum_steps - 1) * (compute.forward_s + compute.backward_s)
    if layout.ranks == 1 or network is None:
        return StepTime(compute.total_s + more, 0.0, 0.0, 0.0)
    exposed = exposed_communication(compute, buckets, lambda size: pace * network.seconds(size, layout))
    every = sum(pace * network.seconds(bucket.num_bytes, layout) for bucket in buckets)
    exposed += interference * max(0.0, every - exposed)
    latency = sum(pace * network.latency_part(layout) for _ in buckets)
    share = latency / every if every else 0.0
    total = compute.total_s + more + exposed
    return StepTime(total, exposed, exposed * share, exposed * (1 - share))
