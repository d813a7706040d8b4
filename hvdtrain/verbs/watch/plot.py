"""A small plot of a curve in characters."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

# Dots of a braille character, by row and column; Unicode numbers them so.
_BRAILLE, _DOTS = 0x2800, ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
_BARS = "▁▂▃▄▅▆▇█"
_ASCII_BARS = "_.-=*#"
_USUAL = (1, 99)
_LABEL = 9

Points = tuple[Sequence[int], Sequence[float]]
"""Steps, ascending, and values; NaN where there is none."""


def sparkline(values: Sequence[float], width: int, is_ascii: bool) -> str:
    """Return a curve as one line of at most `width` characters; where it is not finite, a blank."""
    means = _means((range(len(values)), values), 0, max(1, len(values) - 1), width)[: len(values)]
    low, high = _range([values])
    bars = _ASCII_BARS if is_ascii else _BARS
    return "".join(
        " " if math.isnan(value) else bars[round(_share(value, low, high) * (len(bars) - 1))] for value in means
    )


def plot(line: Points, marks: Points, width: int, height: int, is_ascii: bool) -> list[str]:
    """Return a plot, lines from the top to the bottom: `line` in dots, `marks` as circles over it, axes in numbers.

    Nearly all values are in it; the few that lie far out are drawn at its edge.

    Args:
        line: points that are averaged where there are more than dots.
        marks: points that stand for themselves.
        width: characters, with the labels.
        height: characters, with the line of steps below.
        is_ascii: draw with what every terminal has.
    """
    across, down = max(1, width - _LABEL - 1), max(1, height - 1)
    wide, tall = (1, 1) if is_ascii else (2, 4)
    steps = [*line[0][:1], *line[0][-1:], *marks[0][:1], *marks[0][-1:]]
    if not steps:
        return []
    first, last = min(steps), max(steps)
    means = _means(line, first, last, across * wide)
    low, high = _range([line[1], marks[1]])
    cells = np.zeros((down, across), dtype=np.int64)
    for x, (top, bottom) in _columns(means, low, high, down * tall):
        for y in range(top, bottom + 1):
            cells[y // tall, x // wide] |= _DOTS[y % tall][x % wide]
    drawn = [[_sign(int(dots), is_ascii) for dots in row] for row in cells]
    for step, value in zip(*marks, strict=True):
        if math.isfinite(value):
            x = round((step - first) / max(1, last - first) * (across - 1))
            drawn[round((1 - _share(value, low, high)) * (down - 1))][x] = "o" if is_ascii else "●"
    labels = {0: f"{high:.4g}", down - 1: f"{low:.4g}"}
    rows = [f"{labels.get(y, ''):>{_LABEL}} {''.join(row)}".rstrip() for y, row in enumerate(drawn)]
    ends = f"step {first:,}", f"{last:,}"
    return [*rows, f"{'':{_LABEL + 1}}{ends[0]}{ends[1]:>{max(0, across - len(ends[0]))}}"]


def _sign(dots: int, is_ascii: bool) -> str:
    return " " if not dots else "*" if is_ascii else chr(_BRAILLE + dots)


def _means(points: Points, first: int, last: int, count: int) -> np.ndarray:
    """Return the means of `count` stretches from `first` to `last`; NaN where nothing finite lies."""
    steps, values = np.asarray(points[0], dtype=np.float64), np.asarray(points[1], dtype=np.float64)
    is_finite = np.isfinite(values)
    steps, values = steps[is_finite], values[is_finite]
    places = np.round((steps - first) / max(1, last - first) * (count - 1)).astype(np.int64).clip(0, count - 1)
    sums, counts = (np.bincount(places, weights, minlength=count) for weights in (values, np.ones(len(values))))
    means = np.full(count, np.nan)
    np.divide(sums, counts, out=means, where=counts > 0)
    return _joined(means, len(is_finite) > len(steps))


def _joined(means: np.ndarray, has_gaps: bool) -> np.ndarray:
    """Return means with what lies between two of them on a line; gaps of a curve that is not finite stay."""
    known = np.flatnonzero(~np.isnan(means))
    if has_gaps or known.size < 2:
        return means
    between = np.arange(known[0], known[-1] + 1)
    means[between] = np.interp(between, known, means[known])
    return means


def _range(parts: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Return between what nearly all values lie, of those that are finite."""
    values = np.concatenate([np.asarray(part, dtype=np.float64) for part in parts])
    values = values[np.isfinite(values)]
    if not values.size:
        return 0.0, 1.0
    low, high = (float(value) for value in np.percentile(values, _USUAL))
    return low, high


def _share(value: float, low: float, high: float) -> float:
    return min(1.0, max(0.0, (value - low) / (high - low))) if high > low else 0.5


def _columns(means: np.ndarray, low: float, high: float, tall: int) -> list[tuple[int, tuple[int, int]]]:
    """Return the dots of each column, from the top down: the curve from its last height to this one."""
    columns, before = [], None
    for x, value in enumerate(means.tolist()):
        if math.isnan(value):
            continue
        y = round((1 - _share(value, low, high)) * (tall - 1))
        top, bottom = (y, y) if before is None else (min(y, before), max(y, before))
        columns.append((x, (top, bottom)))
        before = y
    return columns
