"""Which charts a report has, and each of them as Bokeh's own JSON. Bokeh draws; nothing here does."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hvdtrain.trainer.rank_figures import OWN_TIME
from hvdtrain.trainer.stopwatch import OTHER, PARTS
from hvdtrain.verbs.report.events import KINDS, Event
from hvdtrain.verbs.report.figures import COLOURS, base_figure, plain
from hvdtrain.verbs.report.runs import Curve, ReadRun
from hvdtrain.verbs.report.series import Places, averaged, thinned, value_at

_DASHES = ("solid", "dotted", "dotdash", "dashdot")
_HELD_OUT = "dashed"
_EVENT_COLOUR = "#222222"

TITLES = {
    "train/lr": "Learning rate",
    "train/grad_norm": "Gradient norm, before clipping",
    "train/noise_scale": "Gradient noise scale",
    "train/gradient_agreement": "Agreement of the workers' gradients",
    "val/perplexity": "Held-out perplexity",
    "val/bits_per_byte": "Held-out bits per byte",
    "val/accuracy": "Held-out accuracy",
    "throughput/tokens_per_s": "Tokens per second, all ranks",
    "throughput/samples_per_s": "Samples per second, all ranks",
    "throughput/mfu": "MFU: the model's operations, as a share of the devices' peak",
    "time/step_s": "Seconds of a step",
    "time/checkpoint_stall_s": "Seconds that saves held training up",
    "train/loss_scale": "Loss scale",
    "memory/host_bytes": "Bytes of host memory at most, the rank with most",
    "memory/device_bytes": "Bytes of a GPU's memory at most, the rank with most",
    "comm/bytes_per_step": "Bytes that a rank gives to collectives in a step",
}
_LOSS = ("train/loss", "val/loss")
# Axes, sums and counts that are shown in other ways.
_NO_CHART = {
    *("train/epoch", "time/left_s", "time/train_s", "train/skipped_steps", "train/spikes", "checkpoint/failed"),
    *("time/own_median_s", "time/own_slowest_s", "time/slowest_rank"),
    *(f"time/{part}_s" for part in (*PARTS, OTHER)),
}
_FIRST = ("val/", "throughput/", "train/", "time/")
# Metrics by layer share a chart.
_SHARED = "grad_norm/"
_MOST_LINES = 12
# So many points a page has at most, a line at most, and a line at least.
MOST_POINTS = 30_000
_MOST_OF_LINE, _LEAST_OF_LINE = 2000, 20
_FEW = 60
# Of a longer curve, stretches are averaged and drawn over it: noise must not hide where it goes.
_MANY, _STRETCHES = 400, 200
_FAINT, _FAINTER, _CROWD = 0.35, 0.1, 4
_USUAL = (1, 99)
# Below this Bokeh writes numbers as 8.000e-4.
_SMALL = 0.01
_MOST_CHARTS, _MOST_CURVES = 24, 240


@dataclass(frozen=True)
class Line:
    """One curve of a chart."""

    run: int
    metric: str
    label: str
    curve: Curve


@dataclass(frozen=True)
class Chart:
    """Curves that share their axes."""

    title: str
    lines: list[Line]


def charts_of(runs: Sequence[ReadRun]) -> tuple[list[Chart], int]:
    """Return the charts that runs have metrics for, the most looked at first, and how many more were left out."""
    names = {name: None for run in runs for name in run.curves if _has_chart(name)}
    ordered = sorted(names, key=lambda name: next((i for i, p in enumerate(_FIRST) if name.startswith(p)), len(_FIRST)))
    layers = [name for name in ordered if name.startswith(_SHARED)]
    alone = [name for name in ordered if name not in layers]
    charts = [Chart("Loss", [*_lines(runs, _LOSS)]), *(Chart(TITLES.get(n, n), [*_lines(runs, (n,))]) for n in alone)]
    if layers:
        more = f" ({_MOST_LINES} of {len(layers)} layers)" if len(layers) > _MOST_LINES else ""
        places = np.linspace(0, len(layers) - 1, min(len(layers), _MOST_LINES)).astype(int)
        shown = [layers[place] for place in places]
        charts.append(Chart(f"Gradient norm by layer{more}", [*_lines(runs[:1], shown)]))
    charts = [chart for chart in charts if chart.lines]
    most = max(4, min(_MOST_CHARTS, _MOST_CURVES // len(runs)))
    return charts[:most], max(0, len(charts) - most)


def _has_chart(name: str) -> bool:
    return name not in _NO_CHART and name not in _LOSS and not name.startswith(OWN_TIME)


def _lines(runs: Sequence[ReadRun], metrics: Sequence[str]) -> Iterator[Line]:
    short = {"train/loss": "training", "val/loss": "held-out"}
    for number, run in enumerate(runs):
        for metric in metrics:
            if metric in run.curves:
                own = [run.name] if len(runs) > 1 else []
                what = [short.get(metric, metric.removeprefix(_SHARED))] if len(metrics) > 1 or not own else []
                yield Line(number, metric, ", ".join(own + what), run.curves[metric])


def style_of(line: Line, chart: Chart) -> tuple[str, str]:
    """Return a line's colour and dashes."""
    has_one_run = len({line.run for line in chart.lines}) == 1
    number = chart.lines.index(line) if has_one_run else line.run
    colour, dashes = look_of(number)
    is_held_out = line.metric == "val/loss" and number < len(COLOURS)
    return colour, _HELD_OUT if is_held_out else dashes


def look_of(number: int) -> tuple[str, str]:
    """Return the colour and dashes of a run by its number."""
    return COLOURS[number % len(COLOURS)], _DASHES[number // len(COLOURS) % len(_DASHES)]


def usual_range(chart: Chart) -> tuple[float, float] | None:
    """Return between what nearly all values of a chart lie; None where that is no range."""
    values = np.concatenate([line.curve.values for line in chart.lines])
    values = values[np.isfinite(values)]
    if not values.size:
        return None
    low, high = (float(value) for value in np.percentile(values, _USUAL))
    margin = 0.1 * (high - low)
    return (low - margin, high + margin) if 0 < margin < math.inf else None


def draw(
    charts: Sequence[Chart], places: Sequence[Places], events: Sequence[Sequence[Event]], most_points: int
) -> list[dict[str, Any]]:
    """Return each chart as `Bokeh.embed.embed_item` takes it.

    Args:
        charts: as from `charts_of`.
        places: of each run.
        events: of each run.
        most_points: of all curves together, about.
    """
    num_lines = sum(len(chart.lines) for chart in charts)
    most = max(_LEAST_OF_LINE, min(_MOST_OF_LINE, most_points // max(1, num_lines)))
    return [_draw(chart, places, events, most) for chart in charts]


def _draw(chart: Chart, places: Sequence[Places], events: Sequence[Sequence[Event]], most: int) -> dict[str, Any]:
    from bokeh.embed import json_item
    from bokeh.models import HoverTool, PrintfTickFormatter

    plot = base_figure("step")
    drawn = [renderer for line in chart.lines for renderer in _draw_line(plot, line, chart, places[line.run], most)]
    plot.add_tools(HoverTool(renderers=drawn, mode="mouse", **_tooltips("$name")))
    first_of_run = {line.run: line for line in reversed(chart.lines)}
    marked = {run: own for run, line in first_of_run.items() if (own := _on(line, events[run]))}
    if (shown := usual_range(chart)) and 0 < max(map(abs, shown)) < _SMALL:
        plot.yaxis.formatter = PrintfTickFormatter(format="%.4g")
    marks = [_draw_events(plot, first_of_run[run], places[run], own) for run, own in marked.items()]
    if marks:
        plot.add_tools(HoverTool(renderers=marks, mode="mouse", **_tooltips("@text")))
    return dict(json_item(plot))


def _draw_line(plot: Any, line: Line, chart: Chart, places: Places, most: int) -> Iterator[Any]:
    from bokeh.models import ColumnDataSource

    colour, dashes = style_of(line, chart)
    curve = thinned(line.curve, most)
    source = ColumnDataSource(columns_of(curve, places))
    known: dict[str, Any] = {"tags": [line.run], "name": plain(line.label)}
    look = {"line_color": colour, "line_width": 1.8}
    if len(line.curve.steps) <= _MANY:
        yield plot.line("step", "y", source=source, line_dash=dashes, **look, **known)
    else:
        faint = _FAINT if len(chart.lines) <= _CROWD else _FAINTER
        yield plot.line("step", "y", source=source, line_alpha=faint, **look, **known)
        mean = ColumnDataSource(columns_of(averaged(line.curve, _STRETCHES), places))
        known["name"] = plain(f"{line.label} (mean of a stretch)".strip())
        yield plot.line("step", "y", source=mean, line_dash=dashes, **look, **known)
    if len(curve.steps) <= _FEW:
        yield plot.scatter("step", "y", source=source, size=5, color=colour, **known)


def _on(line: Line, events: Sequence[Event]) -> list[Event]:
    """Return the events that lie on a curve, not beside it."""
    steps = line.curve.steps
    return [event for event in events if len(steps) > 1 and steps[0] <= event.step <= steps[-1]]


def _draw_events(plot: Any, line: Line, places: Places, events: Sequence[Event]) -> Any:
    from bokeh.models import ColumnDataSource

    steps = np.array([event.step for event in events], dtype=np.float64)
    columns = columns_of(Curve(steps, value_at(line.curve, steps)), places)
    columns["text"] = [plain(f"{KINDS[event.kind][0]}: {event.text}") for event in events]
    columns["marker"] = [KINDS[event.kind][1] for event in events]
    return plot.scatter(
        "step",
        "y",
        marker="marker",
        size=9,
        fill_color="white",
        line_color=_EVENT_COLOUR,
        line_width=1.5,
        source=ColumnDataSource(columns),
        tags=[line.run],
        name="events",
    )


def columns_of(curve: Curve, places: Places) -> dict[str, Any]:
    """Return a curve along each of the axes, as 32-bit numbers: four in a million is finer than any screen."""
    columns = {
        "step": curve.steps,
        "units": curve.steps * places.per_step,
        "seconds": places.seconds_at(curve.steps),
        "y": curve.values,
    }
    largest = float(np.finfo(np.float32).max)
    return {name: np.clip(values, -largest, largest).astype(np.float32) for name, values in columns.items()}


def _tooltips(head: str) -> dict[str, Any]:
    rows = [("", head), ("step", "@step{0,0}"), ("value", "@y{%.6g}"), ("time", "@seconds{00:00:00}")]
    return {"tooltips": rows, "formatters": {"@y": "printf"}}
