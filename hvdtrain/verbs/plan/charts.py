"""The charts of a plan, each with its interval: Bokeh draws, in the look of the reports."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hvdtrain.errors import counted
from hvdtrain.verbs.plan.answer import Answer
from hvdtrain.verbs.plan.rows import Row
from hvdtrain.verbs.report.figures import COLOURS, base_figure, plain
from hvdtrain.verbs.report.shell import Figure, legend

_PREDICTED, _MEASURED, _BEST, _WAITING, _IDEAL = COLOURS[0], COLOURS[1], COLOURS[2], COLOURS[3], COLOURS[7]
_BAND = 0.2
# A machine that is so busy that its steps differ by their whole length bounds nothing from above.
_MOST_ERROR = 0.9
_MOST_TICKS, _LEAST_APART = 9, 1.5
_INTERVAL = "in nine of ten cases"

Columns = Mapping[str, Sequence[Any]]


def charts_of(answer: Answer) -> list[Figure]:
    """Return throughput and time of a step by workers; with a noise scale also time to the same loss by cost."""
    charts = [_throughput(answer), _step_time(answer)]
    if any(row.relative_time is not None for row in answer.rows):
        charts.append(_time_against_cost(answer))
    return charts


def step_interval(row: Row) -> tuple[float, float]:
    """Return between which bounds a step's seconds lie."""
    error = min(row.error, _MOST_ERROR)
    return row.step.total_s * (1 - error), row.step.total_s * (1 + error)


def _throughput(answer: Answer) -> Figure:
    facts, rows, best = answer.facts, answer.rows, answer.recommended
    plot = _by_workers(answer, y_axis_type="log")
    units = {row.workers: row.units_per_s * row.step.total_s for row in rows}
    bounds = [tuple(units[row.workers] / seconds for seconds in step_interval(row)) for row in rows]
    columns: dict[str, Sequence[Any]] = {
        "workers": [row.workers for row in rows],
        "y": [row.units_per_s for row in rows],
        "low": [low for _, low in bounds],
        "high": [high for high, _ in bounds],
        "ideal": [rows[0].units_per_s * row.workers for row in rows],
    }
    tips = [(facts.unit + "/s", "@y{0,0}"), ("from", "@low{0,0}"), ("to", "@high{0,0}")]
    _band(plot, columns, [("workers", "@workers{0,0}"), *tips])
    plot.line("workers", "ideal", source=_source(columns), line_color=_IDEAL, line_width=1.5, line_dash="dashed")
    measured = _measured(answer)
    of_measured: dict[str, Sequence[Any]] = {
        "workers": [*measured],
        "y": [units.get(n, n * units[1]) / seconds for n, seconds in measured.items()],
    }
    _points(plot, of_measured, [("workers", "@workers{0,0}"), ("measured, per second", "@y{0,0}")])
    _ring(plot, best and (best.workers, best.units_per_s))
    plot.yaxis.formatter.update(format="0,0.[00]a")
    _tick_nicely(plot.yaxis, plot.ygrid, [*columns["low"], *columns["ideal"]])
    shown = best or rows[-1]
    low, high = (units[shown.workers] / seconds for seconds in reversed(step_interval(shown)))
    said = f"{shown.units_per_s:,.0f} {facts.unit}/s on {counted(shown.workers, 'worker')}, {low:,.0f} to {high:,.0f}"
    items = [(_PREDICTED, "solid", f"predicted: {said} {_INTERVAL}"), (_IDEAL, "dashed", "n times one worker's")]
    return Figure(f"Throughput, {facts.unit} a second", _item(plot), legend([*items, *_legend_of_points(answer)]))


def _step_time(answer: Answer) -> Figure:
    rows, best = answer.rows, answer.recommended
    plot = _by_workers(answer)
    bounds = [step_interval(row) for row in rows]
    columns: dict[str, Sequence[Any]] = {
        "workers": [row.workers for row in rows],
        "y": [1e3 * row.step.total_s for row in rows],
        "low": [1e3 * low for low, _ in bounds],
        "high": [1e3 * high for _, high in bounds],
        "waiting": [1e3 * row.step.exposed_s for row in rows],
        "none": [0.0 for _ in rows],
    }
    tips = [("ms a step", "@y{0,0.[00]}"), ("from", "@low{0,0.[00]}"), ("to", "@high{0,0.[00]}")]
    tips.append(("of it waiting for the network", "@waiting{0,0.[00]}"))
    source = _source(columns)
    plot.varea("workers", "none", "waiting", source=source, fill_color=_WAITING, fill_alpha=_BAND)
    plot.line("workers", "waiting", source=source, line_color=_WAITING, line_width=1.5, line_dash="dotted")
    _band(plot, columns, [("workers", "@workers{0,0}"), *tips])
    measured = _measured(answer)
    of_measured: dict[str, Sequence[Any]] = {
        "workers": [*measured],
        "y": [1e3 * seconds for seconds in measured.values()],
    }
    _points(plot, of_measured, [("workers", "@workers{0,0}"), ("measured, ms", "@y{0,0.[00]}")])
    _ring(plot, best and (best.workers, 1e3 * best.step.total_s))
    plot.y_range.start = 0
    shown = best or rows[-1]
    low, high = (1e3 * seconds for seconds in step_interval(shown))
    items = [
        (
            _PREDICTED,
            "solid",
            f"predicted: {1e3 * shown.step.total_s:,.4g} ms on {counted(shown.workers, 'worker')},"
            f" {low:,.4g} to {high:,.4g} {_INTERVAL}",
        ),
        (_WAITING, "dotted", f"of it waiting for the network: {1e3 * shown.step.exposed_s:,.3g} ms there"),
    ]
    return Figure("Time of a step, milliseconds", _item(plot), legend([*items, *_legend_of_points(answer)]))


def _time_against_cost(answer: Answer) -> Figure:
    rows, best = [row for row in answer.rows if row.relative_time is not None], answer.recommended
    plot = base_figure("worker-hours to the same loss, one worker = 1", x_axis_type="log", y_axis_type="log")
    times = [_times(row) for row in rows]
    columns: dict[str, Sequence[Any]] = {"workers": [row.workers for row in rows]}
    # More time is as much more cost: an interval lies along a line of so many workers.
    for place, name in enumerate(("low", "y", "high")):
        columns[name] = [bounds[place] for bounds in times]
        columns[f"cost_{name}"] = [row.workers * bounds[place] for row, bounds in zip(rows, times, strict=True)]
    source = _source(columns)
    plot.segment(
        "cost_low", "low", "cost_high", "high", source=source, line_color=_PREDICTED, line_width=7, line_alpha=_BAND
    )
    plot.line("cost_y", "y", source=source, line_color=_PREDICTED, line_width=1.8)
    dots = plot.scatter("cost_y", "y", source=source, size=6, color=_PREDICTED)
    numbers = {name: [*values] for name, values in columns.items()} | {"text": [f"{row.workers:,}" for row in rows]}
    look = {"text_font_size": "12px", "text_color": "#333333", "x_offset": 7, "y_offset": -4}
    plot.text("cost_y", "y", text="text", source=_source(numbers), **look)
    tips = [("workers", "@workers{0,0}"), ("time", "@y{0.[000]}"), ("from", "@low{0.[000]}"), ("to", "@high{0.[000]}")]
    _hover(plot, dots, [*tips, ("worker-hours", "@cost_y{0.[00]}")])
    shown = best if best is not None and best.relative_time is not None else rows[-1]
    _ring(plot, best and best in rows and (best.workers * (best.relative_time or 0.0), best.relative_time or 0.0))
    plot.yaxis.axis_label = "time, one worker = 1"
    for axis, grid, name in ((plot.xaxis, plot.xgrid, "cost_"), (plot.yaxis, plot.ygrid, "")):
        axis.formatter = _format("0.[000]")
        _tick_nicely(axis, grid, [*columns[f"{name}low"], *columns[f"{name}high"]])
    items = [
        (
            _PREDICTED,
            "solid",
            f"by workers: {shown.relative_time:.3f} of one worker's time on {shown.workers:,}, {shown.time_low:.3f} to"
            f" {shown.time_high:.3f} {_INTERVAL}",
        )
    ]
    items += [(_BEST, "solid", "recommended")] * (best is not None)
    return Figure("Time to the same loss against its cost", _item(plot), legend(items))


def _by_workers(answer: Answer, **kinds: str) -> Any:
    from bokeh.models import FixedTicker

    plot = base_figure("workers", x_axis_type="log", **kinds)
    plot.xaxis.ticker = FixedTicker(ticks=_ticks([row.workers for row in answer.rows]))
    plot.xaxis.formatter = _format("0,0")
    plot.xgrid.ticker = plot.xaxis[0].ticker
    plot.yaxis.formatter = _format("0,0.[00]")
    return plot


def _ticks(workers: Sequence[int]) -> list[int]:
    """Return numbers of workers that have room beside each other on a phone."""
    kept: list[int] = []
    for number in workers:
        if not kept or number >= _LEAST_APART * kept[-1]:
            kept.append(number)
    return kept[:: -(-len(kept) // _MOST_TICKS)]


def _tick_nicely(axis: Any, grid: Any, values: Sequence[float]) -> None:
    """Put 1, 2, 5, 10, ... along a logarithmic axis; Bokeh's own ticks lie on one another where it spans a decade."""
    from bokeh.models import FixedTicker

    low, high = min(values), max(values)
    first, last = (math.floor(math.log10(value)) for value in (low, high))
    parts = next(parts for parts in ((1, 2, 5), (1,)) if len(parts) * (last - first) < _MOST_TICKS or parts == (1,))
    # Some lie outside, for those who look from further away.
    axis.ticker = FixedTicker(ticks=[part * 10.0**power for power in range(first - 1, last + 3) for part in parts])
    grid.ticker = axis[0].ticker


def _format(text: str) -> Any:
    from bokeh.models import NumeralTickFormatter

    return NumeralTickFormatter(format=text)


def _source(columns: Columns) -> Any:
    from bokeh.models import ColumnDataSource

    return ColumnDataSource({name: [*values] for name, values in columns.items()})


def _band(plot: Any, columns: Columns, tips: Sequence[tuple[str, str]]) -> None:
    """Draw what is predicted, its interval around it; of one number of workers, as a bar."""
    source = _source(columns)
    plot.varea("workers", "low", "high", source=source, fill_color=_PREDICTED, fill_alpha=_BAND)
    plot.segment("workers", "low", "workers", "high", source=source, line_color=_PREDICTED, line_alpha=0.5)
    plot.line("workers", "y", source=source, line_color=_PREDICTED, line_width=1.8)
    _hover(plot, plot.scatter("workers", "y", source=source, size=6, color=_PREDICTED), tips)


def _points(plot: Any, columns: Columns, tips: Sequence[tuple[str, str]]) -> None:
    if columns["workers"]:
        known = {"marker": "diamond", "size": 11, "fill_color": _MEASURED, "line_color": "white"}
        _hover(plot, plot.scatter("workers", "y", source=_source(columns), **known), tips)


def _ring(plot: Any, place: Any) -> None:
    if place:
        plot.scatter([place[0]], [place[1]], size=18, fill_color=None, line_color=_BEST, line_width=2.5)


def _hover(plot: Any, renderer: Any, tips: Sequence[tuple[str, str]]) -> None:
    from bokeh.models import HoverTool

    plot.add_tools(HoverTool(renderers=[renderer], tooltips=[(plain(name), value) for name, value in tips]))


def _measured(answer: Answer) -> dict[int, float]:
    most = answer.rows[-1].workers
    return {n: seconds for n, seconds in sorted(answer.facts.measured_steps_s.items()) if n <= most and seconds > 0}


def _legend_of_points(answer: Answer) -> Iterator[tuple[str, str, str]]:
    measured = _measured(answer)
    if measured:
        where = ", ".join(f"{n:,}" for n in measured)
        yield _MEASURED, "solid", f"measured, on {where} worker{'s' * (len(measured) > 1 or 1 not in measured)}"
    if answer.recommended is not None:
        yield _BEST, "solid", f"recommended: {counted(answer.recommended.workers, 'worker')}"


def _item(plot: Any) -> dict[str, Any]:
    from bokeh.embed import json_item

    return dict(json_item(plot))


def _times(row: Row) -> tuple[float, float, float]:
    """Return the time to the same loss between its bounds; none of them is zero, which has no logarithm."""
    time = row.relative_time or 0.0
    return max(row.time_low or 0.0, (1 - _MOST_ERROR) * time), time, row.time_high or time
