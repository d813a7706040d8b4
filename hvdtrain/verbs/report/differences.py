"""What tells runs apart: settings, versions, machines, and the step from which their results differ."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hvdtrain.settings.values import flat
from hvdtrain.verbs.report.runs import ReadRun

MISSING = "-"
# What no two runs have in common, and no result depends on.
_OF_THE_CLOCK = ("time/", "throughput/", "memory/", "comm/", "checkpoint/")


def differing(fields: Sequence[Mapping[str, Any]], ignored: Collection[str] = ()) -> list[tuple[str, list[Any]]]:
    """Return the names whose values are not the same everywhere, with each one's value; `MISSING` where it has none."""
    names = {name: None for own in fields for name in own if name not in ignored}
    rows = [(name, [own.get(name, MISSING) for own in fields]) for name in names]
    return [(name, values) for name, values in rows if any(written(v) != written(values[0]) for v in values[1:])]


def written(value: Any) -> str:
    """Return a value as a person reads it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def packed_environment(environment: Mapping[str, Any]) -> dict[str, Any]:
    """Return an environment by full names; ranks in words, without what differs from one start to the next."""
    values = flat({name: value for name, value in environment.items() if name != "ranks"})
    ranks = environment.get("ranks")
    described = [rank for rank in ranks if isinstance(rank, Mapping)] if isinstance(ranks, list) else []
    if described:
        values["ranks"] = len(described)
        for name in ("host", "device", "threads", "cores"):
            found: dict[str, int] = {}
            for rank in described:
                word = written(rank.get(name, MISSING))
                found[word] = found.get(word, 0) + 1
            said = [f"{word} ({count})" if len(found) > 1 else word for word, count in found.items()]
            values[f"ranks.{name}"] = ", ".join(said)
    return values


@dataclass(frozen=True)
class Divergence:
    """How far the values of a metric are the same in two runs."""

    metric: str
    num_common: int
    """Steps at which both have logged it."""
    last_equal: int | None
    """The last step before which, and at which, all values are the same to the last bit."""
    first_different: int | None
    values: tuple[float, float] = (math.nan, math.nan)
    """At the first step that is different."""
    largest: float = 0.0
    """The largest difference, as a share of the first run's value."""
    largest_at: int = 0


def divergences(a: ReadRun, b: ReadRun) -> list[Divergence]:
    """Return how far each metric that both runs have logged is the same, but for what measures time."""
    names = [name for name in a.curves if name in b.curves and not name.startswith(_OF_THE_CLOCK)]
    found = [_divergence(name, a, b) for name in names]
    return [item for item in found if item.num_common]


def _divergence(name: str, a: ReadRun, b: ReadRun) -> Divergence:
    of_a, of_b = a.curves[name], b.curves[name]
    steps, in_a, in_b = np.intersect1d(of_a.steps, of_b.steps, assume_unique=True, return_indices=True)
    left, right = of_a.values[in_a], of_b.values[in_b]
    is_same = (left == right) | (np.isnan(left) & np.isnan(right))
    if is_same.all():
        return Divergence(name, len(steps), int(steps[-1]) if len(steps) else None, None)
    first = int(is_same.argmin())
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        shares = np.abs(right - left) / np.abs(left)
    shares = np.where(is_same, 0.0, np.where(np.isnan(shares), np.inf, shares))
    worst = int(shares.argmax())
    return Divergence(
        name,
        len(steps),
        int(steps[first - 1]) if first else None,
        int(steps[first]),
        (float(left[first]), float(right[first])),
        float(shares[worst]),
        int(steps[worst]),
    )
