"""What a plan is made of, and the step time on any number of workers that follows from it. Pure functions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hvdtrain.optim.noise import NoiseScale
from hvdtrain.verbs.plan.local import cut, local_step_time
from hvdtrain.verbs.plan.methods import Format, Method, handed_bytes, sends_of
from hvdtrain.verbs.plan.network import Layout, Network
from hvdtrain.verbs.plan.step import Bucket, Compute, Send, StepTime, step_time


@dataclass(frozen=True)
class Facts:
    """Everything that a plan is made of; what `plan.json` holds."""

    recipe: str
    unit: str
    """What is counted, in the plural: tokens or samples."""
    units_per_sample: float
    micro_batch_size: int
    accum_steps: int
    ranks_per_host: int
    """Of the hosts that are planned for."""
    alone: Compute
    """A step of one micro-batch, of one rank while the others of its host wait."""
    together: Compute
    """A step of one micro-batch, of a rank while all ranks of its host compute, the slowest's."""
    together_ranks: int
    """Ranks of a host that did."""
    spread: float
    """Interquartile range of the steps as a share of their median."""
    buckets: Sequence[Bucket]
    network: Network | None
    fp16_network: Network | None
    noise: NoiseScale | None
    interference: float = 0.0
    pace: float = 1.0
    """What the network's times in a step are to those of single all-reduces."""
    measured_steps_s: Mapping[int, float] = field(default_factory=dict)
    """Real steps, with all their micro-batches and with communication, by number of ranks."""
    slowest: str = ""
    """Which rank is slower than the others, and by how much; empty if none is."""
    steps_to_target: int | None = None
    """Steps of the recipe at its own global batch."""
    recipe_batch: int | None = None
    memory_bytes: int | None = None
    """The most that a GPU really held."""
    memory_fixed_bytes: int = 0
    """What a rank needs whatever its micro-batch: weights, gradients, optimizer; with a reserve."""
    memory_sample_bytes: float | None = None
    """What each sample of a micro-batch adds; None: not known."""
    memory_free_bytes: int | None = None
    """What a rank may take; None: not known."""
    by_micro_batch: Mapping[int, Compute] = field(default_factory=dict)
    plain_mpi_s: Mapping[int, float] = field(default_factory=dict)
    compression: str = "none"
    """The recipe's own format of gradients."""
    compression_min_size: int = 1024
    period: int = 50
    """Of local updates, where they are compared."""
    fragments: int = 1
    """Of theirs: the recipe's own."""
    overlap_steps: int = 0
    """Of theirs: the recipe's own."""
    is_sharded: bool = False
    """Whether gradients are scattered, and as many weights gathered (`--optim.shard`): the recipe's own."""
    adds_bfloat16: bool = False
    """Whether the world adds bfloat16 as it is."""
    formats: Mapping[str, Format] = field(default_factory=dict)
    """What was measured of each format of gradients."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Ways to average that training refuses beside the recipe's other settings, by their flags, and why."""

    def own_step_s(self, compute: Compute) -> float:
        """Return the seconds of a step that waits for no other rank, with all its micro-batches."""
        return step_time(compute, [], accum_steps=self.accum_steps).total_s

    @property
    def alone_measured_s(self) -> dict[int, float]:
        """Return the step of one rank, for `measured_steps_s`; none where a step has more than one micro-batch."""
        return {1: self.alone.total_s} if self.accum_steps == 1 else {}

    @property
    def most_samples(self) -> int | None:
        """Return the largest micro-batch that fits into memory, None where that is not known."""
        if self.memory_free_bytes is None or not self.memory_sample_bytes:
            return None
        return max(0, int((self.memory_free_bytes - self.memory_fixed_bytes) / self.memory_sample_bytes))


def compute_on(facts: Facts, layout: Layout) -> Compute:
    """Return the slowest rank's own step while all ranks of its host compute: between those measured, along a line."""
    per_host = layout.per_host
    if layout.ranks == 1 or (per_host == 1 and facts.together_ranks > 1):
        return facts.alone
    if facts.together_ranks == 1:
        return facts.together
    share = min(1.0, (per_host - 1) / (facts.together_ranks - 1))
    return Compute(
        *(
            one + share * (all_of_them - one)
            for one, all_of_them in zip(_parts(facts.alone), _parts(facts.together), strict=True)
        )
    )


def predict(facts: Facts, workers: int) -> StepTime:
    """Return the time of a step on so many workers, by the recipe's own way to average."""
    return predict_by(facts, workers, Method(facts.compression))


def predict_by(facts: Facts, workers: int, method: Method) -> StepTime:
    """Return the time of a step on so many workers that average by this method; in the mean, where not in every step.

    Raises:
        ValueError: what the bytes depend on is not known.
    """
    layout = Layout.of(workers, facts.ranks_per_host)
    compute = compute_on(facts, layout)
    own = facts.formats.get(method.compression, Format(method.compression))
    codec_s, accum_steps = own.computes(workers), facts.accum_steps
    if method.period is None or facts.network is None or workers == 1:
        sends = _sends(facts, method, layout, facts.buckets)
        return step_time(compute, sends, interference=facts.interference, accum_steps=accum_steps, codec_s=codec_s)
    return local_step_time(
        compute,
        [_sends(facts, method, layout, buckets) for buckets in cut(facts.buckets, method.fragments)],
        method.period,
        facts.network.seconds(4, layout),
        overlap_steps=method.overlap_steps,
        interference=facts.interference,
        accum_steps=accum_steps,
        codec_s=codec_s,
    )


def bytes_by(facts: Facts, workers: int, method: Method) -> int:
    """Return what one of so many workers hands over in a step, in the mean."""
    if workers == 1:
        return 0
    shared = (facts.compression_min_size, workers, facts.adds_bfloat16)
    parts = cut(facts.buckets, method.fragments)
    return sum(handed_bytes(buckets, method.compression, *shared) for buckets in parts) // (method.period or 1)


def pace_of(facts: Facts, method: Method) -> float:
    """Return the factor of the network's times: of real steps for the recipe's own way, else of real exchanges."""
    if method == Method(facts.compression):
        return facts.pace
    return facts.formats.get(method.compression, Format(method.compression)).pace


def _sends(facts: Facts, method: Method, layout: Layout, buckets: Sequence[Bucket]) -> list[Send]:
    if layout.ranks == 1 or facts.network is None:
        return []
    is_own = method == Method(facts.compression)
    sends = sends_of(
        buckets,
        method.compression,
        facts.compression_min_size,
        layout,
        (facts.network, facts.fp16_network),
        pace=pace_of(facts, method),
        adds_bfloat16=facts.adds_bfloat16,
    )
    if not (is_own and facts.is_sharded):
        return sends
    # Scattered, and gathered in the end: each moves half of what an all-reduce does.
    halves = [dataclasses.replace(send, bandwidth_s=send.bandwidth_s / 2) for send in sends]
    return [*halves, *(dataclasses.replace(half, ready=1.0) for half in halves)]


def _parts(compute: Compute) -> tuple[float, float, float]:
    return compute.forward_s, compute.backward_s, compute.rest_s
