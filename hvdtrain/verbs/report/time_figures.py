"""Where a step's time goes, as areas over the steps, and each rank's own time as a heat map."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hvdtrain.trainer.rank_figures import OWN_TIME
from hvdtrain.trainer.stopwatch import OTHER, PARTS
from hvdtrain.verbs.report.charts import COLOURS, base_figure, columns_of, plain, without_axes
from hvdtrain.verbs.report.runs import Curve, Floats, ReadRun
from hvdtrain.verbs.report.series import Places, averaged
from hvdtrain.verbs.report.tables import escape

NAMES = {
    "data": "data wait",
    "compute": "forward and backward",
    "communication": "exposed communication",
    "optimizer": "optimizer",
    OTHER: "other",
}
_MOST_RUNS = 4
_STRETCHES = 200
_COLUMNS = 120
# The first line has what happens once; of few lines it is kept.
_FEW = 5
_SLOWEST = 3.0


@dataclass(frozen=True)
class TimeFigure:
    """A figure of the page that is no chart of lines."""

    title: str
    item: dict[str, Any]
    """As `Bokeh.embed.embed_item` takes it."""
    caption: str
    """What is to be seen in it, as HTML."""


def time_figures(runs: Sequence[ReadRun], places: Sequence[Places]) -> list[TimeFigure]:
    """Return the figures of time that runs have metrics for; of many runs, those of the first."""
    return [*_split_figures(runs, places), *_heat_maps(runs)]


def parts_of(run: ReadRun) -> tuple[Floats, dict[str, Floats]] | None:
    """Return the steps `(n,)` of the lines that tell all parts of a step's time, and each part's seconds `(n,)`."""
    curves = {part: run.curves.get(f"time/{part}_s") for part in (*PARTS, OTHER)}
    known = [curve for curve in curves.values() if curve is not None]
    if len(known) < len(curves):
        return None
    steps = known[0].steps
    for curve in known:
        steps = np.intersect1d(steps, curve.steps, assume_unique=True)
    values = {part: curve.values[np.isin(curve.steps, steps)] for part, curve in curves.items() if curve is not None}
    is_known = np.isfinite(np.stack([*values.values()])).all(axis=0)
    first = 1 if is_known.sum() > _FEW else 0
    steps = steps[is_known][first:]
    return (steps, {part: own[is_known][first:] for part, own in values.items()}) if steps.size else None


def _split_figures(runs: Sequence[ReadRun], places: Sequence[Places]) -> Iterator[TimeFigure]:
    for run, place in [*zip(runs, places, strict=True)][:_MOST_RUNS]:
        found = parts_of(run)
        if found is None:
            continue
        of_run = f", {run.name}" if len(runs) > 1 else ""
        steps, parts = found
        yield TimeFigure(f"Where a step's time goes{of_run}", _areas(steps, parts, place), _said_of_parts(parts))


def _areas(steps: Floats, parts: dict[str, Floats], place: Places) -> dict[str, Any]:
    from bokeh.embed import json_item
    from bokeh.models import ColumnDataSource, HoverTool

    plot: Any = base_figure("step")
    means = {part: averaged(Curve(steps, values), _STRETCHES) for part, values in parts.items()}
    below = np.zeros(len(means[OTHER].steps))
    lines = []
    for (part, mean), colour in zip(means.items(), COLOURS, strict=False):
        above = below + mean.values
        columns = columns_of(Curve(mean.steps, above), place)
        columns["low"], columns["own"] = (values.astype(np.float32) for values in (below, mean.values))
        source = ColumnDataSource(columns)
        plot.varea("step", "low", "y", source=source, fill_color=colour, fill_alpha=0.75)
        lines.append(plot.line("step", "y", source=source, line_color=colour, line_width=1.5, name=plain(NAMES[part])))
        below = above
    rows = [("", "$name"), ("step", "@step{0,0}"), ("seconds of a step", "@own{%.4g}"), ("time", "@seconds{00:00:00}")]
    plot.add_tools(HoverTool(renderers=lines, mode="mouse", tooltips=rows, formatters={"@own": "printf"}))
    plot.y_range.start = 0
    plot.yaxis.axis_label = "seconds, rank 0"
    return dict(json_item(plot))


def _said_of_parts(parts: dict[str, Floats]) -> str:
    whole = sum(float(values.mean()) for values in parts.values()) or 1.0
    items = []
    for (part, values), colour in zip(parts.items(), COLOURS, strict=False):
        chip = f"<span class='chip' style='border-top-style:solid;border-color:{colour}'></span>"
        mean = float(values.mean())
        items.append(f"<li>{chip}<span>{NAMES[part]}: {mean:.3g} s of a step, {mean / whole:.0%}</span></li>")
    return f"<ul>{''.join(items)}</ul>"


def _heat_maps(runs: Sequence[ReadRun]) -> Iterator[TimeFigure]:
    for run in runs[:_MOST_RUNS]:
        found = own_times(run)
        if found is None:
            continue
        steps, ranks, seconds = found
        usual = np.median(seconds, axis=0)
        ratios = seconds / np.where(usual > 0, usual, 1.0)
        means = ratios.mean(axis=1)
        slowest = int(means.argmax())
        of_run = f", {run.name}" if len(runs) > 1 else ""
        yield TimeFigure(
            f"Own time of a step by rank{of_run}",
            _heat_map(steps, ranks, seconds, ratios),
            f"<p>Each rank's own part of a step, without waiting for others; the darker, the slower."
            f" Rank {ranks[slowest]} takes longest: {escape(f'{means[slowest]:.2f}')} times the median,"
            f" {seconds[slowest].mean():.3g} s of a step.</p>",
        )


def own_times(run: ReadRun) -> tuple[Floats, list[int], Floats] | None:
    """Return steps `(n,)`, ranks, and each rank's own seconds of a step `(ranks, n)`, as means of some stretches."""
    named = {int(found[1]): name for name in run.curves if (found := re.fullmatch(rf"{OWN_TIME}(\d{{1,4}})", name))}
    if len(named) < 2:
        return None
    ranks = sorted(named)
    curves = [run.curves[named[rank]] for rank in ranks]
    steps = curves[0].steps
    for curve in curves[1:]:
        steps = np.intersect1d(steps, curve.steps, assume_unique=True)
    if steps.size == 0:
        return None
    rows = [Curve(steps, np.nan_to_num(curve.values[np.isin(curve.steps, steps)])) for curve in curves]
    means = [averaged(row, _COLUMNS) for row in rows]
    return means[0].steps, ranks, np.stack([mean.values for mean in means])


def _heat_map(steps: Floats, ranks: Sequence[int], seconds: Floats, ratios: Floats) -> dict[str, Any]:
    from bokeh.embed import json_item
    from bokeh.models import ColumnDataSource, HoverTool, LinearColorMapper
    from bokeh.models.annotations import ColorBar
    from bokeh.palettes import Blues256

    plot: Any = base_figure("step")
    without_axes(plot)
    width = float(steps[-1] - steps[0]) / max(1, len(steps) - 1) or 1.0
    colours = LinearColorMapper(
        palette=Blues256[::-1], low=1.0, high=float(np.clip(ratios.max(), 1.5, _SLOWEST)), nan_color="#ffffff"
    )
    # Hovering looks up what has the image's shape.
    source = ColumnDataSource({"image": [ratios.astype(np.float32)], "seconds": [seconds.astype(np.float32)]})
    plot.image(
        image="image",
        source=source,
        x=float(steps[0]) - width / 2,
        y=ranks[0] - 0.5,
        dw=width * len(steps),
        dh=len(ranks),
        color_mapper=colours,
    )
    rows = [("rank", "$y{0}"), ("step", "$x{0,0}"), ("times the median", "@image{%.3g}"), ("seconds", "@seconds{%.4g}")]
    plot.add_tools(HoverTool(tooltips=rows, formatters={"@image": "printf", "@seconds": "printf"}))
    plot.add_layout(ColorBar(color_mapper=colours, width=10, title="", background_fill_color=None), "right")
    plot.yaxis.axis_label = "rank"
    plot.yaxis.ticker.min_interval = 1
    plot.grid.visible = False
    return dict(json_item(plot))
