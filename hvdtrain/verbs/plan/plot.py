"""A plot with two logarithmic axes as SVG."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

_COLOURS = {"ideal": "#999999", "predicted": "#1f6fb4"}
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 560, 380, 80, 50


def plot(
    title: str,
    x_label: str,
    lines: Mapping[str, Sequence[tuple[float, float]]],
    points: Sequence[tuple[float, float]],
    marked: tuple[float, float] | None,
    labels: Sequence[str] = (),
) -> str:
    """Return an SVG: lines by name, points for what was measured, a ring around `marked`, labels along the lines."""
    axes = _Axes.around([point for line in lines.values() for point in line] + list(points))
    parts = [_frame(title, x_label), *axes.ticks()]
    for i, (name, line) in enumerate(lines.items()):
        parts += _line(axes, name, line, labels, row=i)
    for x, y in map(axes.pixel, points):
        parts.append(f"<circle cx='{x:.1f}' cy='{y:.1f}' r='5' fill='#d1495b'><title>measured</title></circle>")
    if marked is not None:
        x, y = axes.pixel(marked)
        parts.append(f"<circle cx='{x:.1f}' cy='{y:.1f}' r='9' fill='none' stroke='#2a9d4b' stroke-width='2'/>")
    return "".join([*parts, "</svg>"])


@dataclass(frozen=True)
class _Axes:
    """Two logarithmic axes: the values at their ends."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    @staticmethod
    def around(points: Sequence[tuple[float, float]]) -> _Axes:
        """Return axes that hold all points, with a margin."""
        xs, ys = ([point[i] for point in points] for i in (0, 1))
        return _Axes(*_limits(xs), *_limits(ys))

    def pixel(self, point: tuple[float, float]) -> tuple[float, float]:
        """Return where a point lies in the picture."""
        x = (math.log(point[0]) - math.log(self.x_low)) / (math.log(self.x_high) - math.log(self.x_low))
        y = (math.log(point[1]) - math.log(self.y_low)) / (math.log(self.y_high) - math.log(self.y_low))
        return _LEFT + x * (_WIDTH - _LEFT - 20), _HEIGHT - _BOTTOM - y * (_HEIGHT - _BOTTOM - 40)

    def ticks(self) -> Iterator[str]:
        """Yield the numbers along both axes."""
        for value in _ticks(self.x_low, self.x_high):
            x, _ = self.pixel((value, self.y_low))
            yield f"<text x='{x:.1f}' y='{_HEIGHT - 32}' font-size='12' text-anchor='middle'>{value:,.3g}</text>"
        for value in _ticks(self.y_low, self.y_high):
            _, y = self.pixel((self.x_low, value))
            yield f"<text x='{_LEFT - 6}' y='{y + 4:.1f}' font-size='12' text-anchor='end'>{value:,.3g}</text>"


def _frame(title: str, x_label: str) -> str:
    return (
        f"<svg width='{_WIDTH}' height='{_HEIGHT}' role='img' aria-label='{html.escape(title)}'>"
        f"<text x='{_LEFT}' y='20' font-size='15'>{html.escape(title)}</text>"
        f"<text x='{_WIDTH / 2}' y='{_HEIGHT - 8}' font-size='13'>{html.escape(x_label)}</text>"
        f"<rect x='{_LEFT}' y='40' width='{_WIDTH - _LEFT - 20}' height='{_HEIGHT - _BOTTOM - 40}'"
        " fill='none' stroke='#ccc'/>"
    )


def _line(
    axes: _Axes, name: str, line: Sequence[tuple[float, float]], labels: Sequence[str], row: int
) -> Iterator[str]:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(axes.pixel, line))
    dashes = " stroke-dasharray='5 4'" if name == "ideal" else ""
    yield f"<polyline points='{path}' fill='none' stroke='{_COLOURS[name]}' stroke-width='2'{dashes}/>"
    yield f"<text x='{_WIDTH - 100}' y='{58 + 16 * row}' font-size='12' fill='{_COLOURS[name]}'>{name}</text>"
    for (x, y), label in zip(map(axes.pixel, line), labels, strict=False):
        yield f"<text x='{x + 5:.1f}' y='{y - 5:.1f}' font-size='12'>{label}</text>"


def _limits(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return low / 1.15, high * 1.15


def _ticks(low: float, high: float) -> list[float]:
    ticks = [m * 10.0**e for e in range(-9, 13) for m in (1, 2, 5)]
    inside = [tick for tick in ticks if low <= tick <= high]
    return inside if len(inside) <= 9 else inside[:: -(-len(inside) // 9)]
