"""Ranks that average rarely: what they send, whole or by fragments, and their mean step. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hvdtrain.trainer.fragments import in_fragments
from hvdtrain.verbs.plan.step import Bucket, Compute, Send, StepTime
from hvdtrain.world.asking import MOST_SECONDS, MOST_STEPS


def cut(buckets: Sequence[Bucket], count: int) -> list[list[Bucket]]:
    """Return what travels with each of so many fragments (`--comm.fragments`), a bucket for each type of numbers.

    One fragment travels in the buckets that there are. Where shapes are not known, each takes an equal share of all.
    """
    if count == 1:
        return [list(buckets)]
    if not all(bucket.shapes for bucket in buckets):
        return [[Bucket(1.0, -(-bucket.num_bytes // count), (), bucket.dtype) for bucket in buckets]] * count
    places = {f"{i}.{j}": (i, j) for i, bucket in enumerate(buckets) for j in range(len(bucket.shapes))}
    sizes = {name: torch.Size(buckets[i].shapes[j]).numel() for name, (i, j) in places.items()}
    return [_joined(buckets, [places[name] for name in names]) for names in in_fragments(sizes, count)]


def _joined(buckets: Sequence[Bucket], places: Sequence[tuple[int, int]]) -> list[Bucket]:
    """Return tensors, each by its bucket and its place there, as a bucket for each of their types."""
    found = []
    for dtype in dict.fromkeys(buckets[i].dtype for i, _ in places):
        own = [(i, j) for i, j in places if buckets[i].dtype == dtype]
        shapes = tuple(buckets[i].shapes[j] for i, j in own)
        exact = tuple(place for place, (i, j) in enumerate(own) if j in buckets[i].exact)
        num_bytes = sum(torch.Size(shape).numel() for shape in shapes) * getattr(torch, dtype).itemsize
        found.append(Bucket(1.0, num_bytes, shapes, dtype, exact, buckets[own[0][0]].exact_for))
    return found


def local_step_time(
    compute: Compute,
    parts: Sequence[Sequence[Send]],
    period: int,
    question_s: float,
    *,
    overlap_steps: int = 0,
    interference: float = 0.0,
    accum_steps: int = 1,
    codec_s: float = 0.0,
) -> StepTime:
    """Return the mean time of a step where ranks train apart and average each fragment once in `period` steps.

    A fragment is waited for as far as it takes longer than the steps in which it may arrive; all of them together,
    as far as they take longer than a period: one link carries them all. What follows the first round of a format, as
    int8's second on more than two ranks, begins only when its average is taken.

    Args:
        compute: as for `step_time`.
        parts: what is sent for each fragment.
        period: steps between two averages of a fragment.
        question_s: of the small all-reduce that asks, beside some steps, whether any rank wants to stop.
        overlap_steps: in which an average may arrive while training goes on; 0: all wait for all of it.
        interference: as for `step_time`, of what training does not wait for.
        accum_steps: micro-batches of a step.
        codec_s: what the format itself computes for an average of everything.
    """
    own = compute.total_s + (accum_steps - 1) * (compute.forward_s + compute.backward_s)
    every = sum(send.seconds for sends in parts for send in sends)
    late = sum(send.seconds for sends in parts for send in sends if send.follows)
    for sends in parts:
        late += max(0.0, sum(send.seconds for send in sends if not send.follows) - overlap_steps * own)
    waited = max(late, every - period * own) if overlap_steps else every
    waited += interference * (every - waited) if overlap_steps else 0.0
    share = sum(send.latency_s for sends in parts for send in sends) / every if every else 0.0
    steps = min(MOST_STEPS, max(1, int(MOST_SECONDS / own)))
    asks = max(0.0, question_s / steps - own)
    exposed = waited / period + asks
    latency = share * waited / period + asks
    return StepTime(own + exposed + codec_s / period, exposed, latency, exposed - latency)
