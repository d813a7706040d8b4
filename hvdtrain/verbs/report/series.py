"""Curves as they are drawn: by step, by tokens or samples, by time; thinned so that no spike is lost."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from hvdtrain.verbs.report.runs import Curve, Floats, ReadRun

_PREFIX, _SUFFIX = "throughput/", "_per_s"


@dataclass(frozen=True)
class Places:
    """Where a run's steps lie on the axes that are not the step."""

    unit: str
    """What a step is made of: tokens, samples; "" where the run has not logged it."""
    per_step: float
    """How many of them."""
    steps: Floats
    seconds: Floats
    """Of training, without evaluations and saves, up to `steps`."""

    @classmethod
    def of(cls, run: ReadRun) -> Places:
        """Return a run's axes, from the seconds and the throughput that it has logged."""
        laps = run.curves.get("time/step_s")
        throughput = next((name for name in run.curves if name.startswith(_PREFIX) and name.endswith(_SUFFIX)), None)
        if laps is None:
            return cls("", 0.0, np.zeros(1), np.zeros(1))
        lengths = np.diff(laps.steps, prepend=0.0)
        seconds = np.cumsum(np.nan_to_num(laps.values) * lengths)
        unit, per_step = "", 0.0
        if throughput:
            _, in_both, too = np.intersect1d(
                laps.steps, run.curves[throughput].steps, assume_unique=True, return_indices=True
            )
            products = laps.values[in_both] * run.curves[throughput].values[too]
            products = products[np.isfinite(products)]
            if products.size:
                unit, per_step = throughput[len(_PREFIX) : -len(_SUFFIX)], float(np.median(products))
        return cls(unit, per_step, np.append(0.0, laps.steps), np.append(0.0, seconds))

    def seconds_at(self, steps: Floats) -> Floats:
        """Return the seconds of training up to each step."""
        return np.interp(steps, self.steps, self.seconds)


def thinned(curve: Curve, most: int) -> Curve:
    """Return a curve of about `most` points at most, with the lowest and the highest of each stretch.

    What is not finite stays as a gap: one point of each stretch that has any.
    """
    num = len(curve.steps)
    if num <= most:
        return curve
    kept = [0, num - 1]
    edges = np.linspace(0, num, max(2, most // 2 + 1)).astype(int)
    for start, end in itertools.pairwise(edges):
        values = curve.values[start:end]
        gaps = np.isnan(values)
        if not gaps.all():
            kept += [start + int(np.nanargmin(values)), start + int(np.nanargmax(values))]
        if gaps.any():
            kept.append(start + int(gaps.argmax()))
    order = np.unique(kept)
    return Curve(curve.steps[order], curve.values[order])


def averaged(curve: Curve, most: int) -> Curve:
    """Return the means of `most` stretches of a curve at most, each in its middle; what is not finite is left out."""
    is_finite = np.isfinite(curve.values)
    steps, values = curve.steps[is_finite], curve.values[is_finite]
    edges = np.unique(np.linspace(0, len(steps), most + 1).astype(int))
    lengths = np.diff(edges)
    if not lengths.size:
        return Curve(steps, values)
    return Curve(np.add.reduceat(steps, edges[:-1]) / lengths, np.add.reduceat(values, edges[:-1]) / lengths)


def value_at(curve: Curve, steps: Floats) -> Floats:
    """Return a curve's height at these steps, to put a mark on it; what is not finite is bridged."""
    is_finite = np.isfinite(curve.values)
    if not is_finite.any():
        return np.full(len(steps), np.nan)
    return np.interp(steps, curve.steps[is_finite], curve.values[is_finite])
