"""The time of a training step on any number of ranks: what is computed, what is sent meanwhile, what is waited for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from hvdtrain.world import Cargo, codec_of


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
    """That one rank hands over where they travel as they are."""
    shapes: tuple[tuple[int, ...], ...] = ()
    """Of the gradients, for formats whose bytes depend on them."""
    dtype: str = "float32"
    exact: tuple[int, ...] = ()
    """Places of the tensors that `--comm.compression-exact` means, or that belong to a vocabulary."""
    exact_for: tuple[str, ...] = ()
    """Formats that send these as they are."""
    whole: int | None = None
    """Number of the bucket of which this is a part, for formats that gain nothing by parts."""

    def cargo(self, compression: str) -> Cargo:
        """Return its gradients as a format, `powersgd:4` and so on, is given them."""
        exact = self.exact if compression.partition(":")[0] in self.exact_for else ()
        return Cargo(tuple(map(torch.Size, self.shapes)), getattr(torch, self.dtype), exact)


def travelling(buckets: Sequence[Bucket], compression: str) -> list[Bucket]:
    """Return the buckets in which a format, `powersgd:4` and so on, sends these."""
    if codec_of(compression).gains_by_parts:
        return list(buckets)
    wholes: dict[int, list[Bucket]] = {}
    for place, bucket in enumerate(buckets):
        wholes.setdefault(-1 - place if bucket.whole is None else bucket.whole, []).append(bucket)
    return [
        parts[0] if len(parts) == 1 else replace(joined(parts), ready=max(part.ready for part in parts))
        for parts in wholes.values()
    ]


def joined(buckets: Sequence[Bucket]) -> Bucket:
    """Return the gradients of buckets of one type as one bucket, which is ready when backward is over."""
    shapes: list[tuple[int, ...]] = []
    exact: list[int] = []
    for bucket in buckets:
        exact += [len(shapes) + place for place in bucket.exact]
        shapes += bucket.shapes
    num_bytes = sum(bucket.num_bytes for bucket in buckets)
    first = buckets[0]
    return Bucket(1.0, num_bytes, tuple(shapes), first.dtype, tuple(exact), first.exact_for)


@dataclass(frozen=True)
class Send:
    """A message in a step."""

    ready: float
    """When it can leave, as a share of the backward pass."""
    latency_s: float
    bandwidth_s: float
    follows: bool = False
    """Whether it leaves only when another message has arrived and is waited for."""

    @property
    def seconds(self) -> float:
        """Return how long it is on its way."""
        return self.latency_s + self.bandwidth_s


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


def exposed_communication(compute: Compute, sends: Iterable[Send]) -> float:
    """Return how long a step waits for the network after its backward pass.

    Messages leave in turn, each when it is ready and the one before has arrived.

    Args:
        compute: gives the time of the backward pass.
        sends: in the order in which they become ready.
    """
    done = 0.0
    for send in sends:
        done = max(done, send.ready * compute.backward_s) + send.seconds
    return max(0.0, done - compute.backward_s)


def step_time(
    compute: Compute,
    sends: Sequence[Send],
    *,
    interference: float = 0.0,
    accum_steps: int = 1,
    codec_s: float = 0.0,
) -> StepTime:
    """Return the time of a step.

    Args:
        compute: of one micro-batch, the optimizer included.
        sends: in the order in which they become ready; none for one rank.
        interference: the share of hidden communication that slows computing down by as much, as where ranks compute on
            the cores that also move the bytes; measured.
        accum_steps: micro-batches before each exchange.
        codec_s: what the format itself computes.
    """
    more = (accum_steps - 1) * (compute.forward_s + compute.backward_s)
    if not sends:
        return StepTime(compute.total_s + more, 0.0, 0.0, 0.0)
    exposed = exposed_communication(compute, sends)
    every = sum(send.seconds for send in sends)
    exposed += interference * max(0.0, every - exposed)
    share = sum(send.latency_s for send in sends) / every if every else 0.0
    total = compute.total_s + more + exposed + codec_s
    return StepTime(total, exposed, exposed * share, exposed * (1 - share))
