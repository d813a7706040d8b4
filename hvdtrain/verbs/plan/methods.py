"""Ways to average between ranks: what each one sends, computes and takes on any number of ranks. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch

from hvdtrain.errors import counted
from hvdtrain.settings import CommConfig
from hvdtrain.settings.compression import EXACT, parse_compression
from hvdtrain.settings.flags import COMMAND_LINE
from hvdtrain.verbs.plan.kinds import Layout, way_of
from hvdtrain.verbs.plan.network import Network
from hvdtrain.verbs.plan.step import Bucket, Send, travelling
from hvdtrain.world import Message, codec_of, messages_of

FORMATS = ("none", "fp16", "bf16", "int8", "powersgd:4", "topk:0.01")
"""That are planned for, besides the recipe's own."""


@dataclass(frozen=True)
class Method:
    """How ranks average, as settings say it."""

    compression: str = "none"
    period: int | None = None
    """Steps between two averages of local updates; None: gradients are averaged in every step."""
    outer: str = "average"
    fragments: int = 1
    """Parts of the model that local updates average at steps of their own."""
    overlap_steps: int = 0
    """In which an average of theirs may arrive."""

    @property
    def name(self) -> str:
        """Return what the table calls it."""
        wire = "" if self.compression == "none" else f", {self.compression}"
        if self.period is None:
            return f"every step{wire}"
        parts = f", {self.fragments} fragments" if self.fragments > 1 else ""
        late = f", {self.overlap_steps} late" if self.overlap_steps else ""
        name = "DiLoCo" if self.outer == "nesterov" else "local SGD"
        return f"{name}, {counted(self.period, 'step')}{wire}{parts}{late}"

    @property
    def settings(self) -> dict[str, Any]:
        """Return the settings of `--comm` by name; of what belongs to local updates all or none."""
        if self.period is None:
            return {"compression": self.compression, "sync": "every-step"}
        own = {"compression": self.compression, "sync": "local", "period": self.period, "outer": self.outer}
        return {**own, "fragments": self.fragments, "overlap_steps": self.overlap_steps}

    @property
    def flags(self) -> str:
        """Return the settings of the command line, "" for the defaults."""
        given = {
            name: value
            for name, value in self.settings.items()
            if name == "period" or value != getattr(CommConfig, name)  # a recipe may have another period
        }
        return " ".join(f"{COMMAND_LINE.name(f'comm.{name}')} {value}" for name, value in given.items())


@dataclass(frozen=True)
class Format:
    """What was measured of a format of gradients."""

    compression: str
    codec_s: Mapping[int, float] = field(default_factory=dict)
    """Seconds that it computes for all gradients, by number of ranks: what is gathered grows with them."""
    exchange_s: float | None = None
    """Of all gradients, one bucket after the other, over the measured ranks, without a step around it; what the format
    computes is part of it."""
    pace: float = 1.0
    """What the network's times in that are to those of single collectives."""
    explained_s: float | None = None
    """What its computing and its single collectives explain of `exchange_s`."""

    def computes(self, ranks: int) -> float:
        """Return the seconds that it computes on so many ranks: between those measured, or beyond, along a line."""
        known = sorted(self.codec_s)
        if not known or ranks < 2:
            return 0.0
        if ranks <= known[0] or len(known) == 1:
            return self.codec_s[known[0]]
        upper = next((i for i, n in enumerate(known) if n >= ranks), len(known) - 1)
        left, right = known[upper - 1], known[upper]
        slope = max(0.0, (self.codec_s[right] - self.codec_s[left]) / (right - left))
        return self.codec_s[left] + slope * (ranks - left)


def methods_of(own: str, period: int, fragments: int = 1, overlap_steps: int = 0) -> list[Method]:
    """Return the ways that are compared; the recipe's own format first.

    Args:
        own: the recipe's `--comm.compression`.
        period: its `--comm.period`.
        fragments: its `--comm.fragments`; where it has one, and no overlap, four are compared with one.
        overlap_steps: its `--comm.overlap-steps`.
    """
    formats = dict.fromkeys((own, *FORMATS))
    local = [Method(period=period), Method(period=period, outer="nesterov"), Method("int8", period, "nesterov")]
    if fragments == 1 and not overlap_steps:
        fragments, overlap_steps = min(4, period), min(period - 1, -(-period // 8))
    if fragments > 1 or overlap_steps:
        local.append(Method("int8", period, "nesterov", fragments, overlap_steps))
    return [*map(Method, formats), *local]


def sends_of(
    buckets: Sequence[Bucket],
    compression: str,
    min_size: int,
    layout: Layout,
    networks: tuple[Network, Network | None],
    *,
    pace: float = 1.0,
    adds_bfloat16: bool = False,
) -> list[Send]:
    """Return the messages of a step, in the order in which they become ready.

    Args:
        buckets: of the gradients.
        compression: the format, as `--comm.compression` says it.
        min_size: `--comm.compression-min-size`.
        layout: of the ranks.
        networks: for fp32, and for fp16 where it was measured by itself: MPI adds it in another way.
        pace: factor of the network's times.
        adds_bfloat16: whether the world adds bfloat16 as it is.
    """
    sends = []
    for bucket in travelling(buckets, compression):
        for message in messages(bucket, compression, min_size, layout.ranks, adds_bfloat16):
            half = message.dtype == torch.float16
            network = networks[1] if half and networks[1] is not None else networks[0]
            way = way_of(message)
            latency = pace * network.latency_part(layout, way)
            bytes_s = pace * network.bandwidth_part(message.num_bytes, layout, way)
            # What follows a first round leaves when backward is over.
            ready = min(1.0, bucket.ready) if message.is_first else 1.0
            sends.append(Send(ready, latency, bytes_s, follows=not message.is_first))
    return sorted(sends, key=lambda send: send.ready)


@lru_cache(maxsize=4096)
def messages(bucket: Bucket, compression: str, min_size: int, ranks: int, adds_bfloat16: bool) -> tuple[Message, ...]:
    """Return what each of so many ranks hands over for a bucket.

    Raises:
        ValueError: the bucket's shapes, on which the format's bytes depend, are not known.
    """
    name, _ = parse_compression(compression)
    if bucket.shapes:
        options = {} if name in EXACT else {"min_size": min_size}
        cargo = bucket.cargo(compression)
        return tuple(messages_of(codec_of(compression, **options), cargo, ranks, adds_bfloat16=adds_bfloat16))
    if name == "none":
        return (Message("all_reduce", bucket.num_bytes, torch.float32),)
    if name == "fp16":
        return (Message("all_reduce", bucket.num_bytes // 2, torch.float16),)
    raise ValueError(f"the bytes of {compression} depend on shapes that are not known")


def handed_bytes(
    buckets: Sequence[Bucket], compression: str, min_size: int, ranks: int, adds_bfloat16: bool = False
) -> int:
    """Return the bytes that one rank hands over for all gradients."""
    sent = travelling(buckets, compression)
    found = (messages(bucket, compression, min_size, ranks, adds_bfloat16) for bucket in sent)
    return sum(message.num_bytes for parts in found for message in parts)
