"""Where a step's time goes, as areas over the steps, and each rank's own time as a heat map."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from hvdtrain.trainer.rank_figures import OWN_TIME
from hvdtrain.trainer.stopwatch import OTHER, PARTS
from hvdtrain.verbs.report.charts import columns_of
from hvdtrain.verbs.report.figures import COLOURS, base_figure, plain, without_axes
from hvdtrain.verbs.report.runs import Curve, Floats, ReadRun
from hvdtrain.verbs.report.series import Places, averaged
from hvdtrain.verbs.report.shell import Figure, legend

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


def time_figures(runs: Sequence[ReadRun], places: Sequence[Places]) -> list[Figure]:
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


def _split_figures(runs: Sequence[ReadRun], places: Sequence[Places]) -> Iterator[Figure]:
    for run, place in [*zip(runs, places, strict=True)][:_MOST_RUNS]:
        found = parts_of(run)
        if found is None:
            continue
        of_run = f", {run.name}" if len(runs) > 1 else ""
        steps, parts = found
        yield Figure(f"Where a step's time goes{of_run}", _areas(steps, parts, place), _said_of_parts(parts))


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
        mean = float(values.mean())
        items.append((colour, "solid", f"{NAMES[part]}: {mean:.3g} s of a step, {mean / whole:.0%}"))
    return legend(items)


def _heat_maps(runs: Sequence[ReadRun]) -> Iterator[Figure]:
    for run in runs[:_MOST_RUNS]:
        found = own_times(run)
        if found is None:
            continue
        steps, ranks, seconds = found
        usual = np.nanmedian(seconds, axis=0)
        ratios = seconds / np.where(usual > 0, usual, 1.0)
        means = np.nanmean(ratios, axis=1)
        slowest = int(means.argmax())
        of_run = f", {run.name}" if len(runs) > 1 else ""
        yield Figure(
            f"Own time of a step by rank{of_run}",
            _heat_map(steps, ranks, seconds, ratios),
            f"<p>Each rank's own part of a step, without waiting for others; the darker, the slower."
            f" Rank {ranks[slowest]} takes longest: {means[slowest]:.2f} times the median,"
            f" {np.nanmean(seconds[slowest]):.3g} s of a step.</p>",
        )


def own_times(run: ReadRun) -> tuple[Floats, list[int], Floats] | None:
    """Return the middles of stretches of steps `(n,)`, ranks, and each rank's own seconds of a step `(ranks, n)`.

    NaN where there was no such rank: a run may go on with fewer of them, or more.
    """
    named = {int(found[1]): name for name in run.curves if (found := re.fullmatch(rf"{OWN_TIME}(\d{{1,4}})", name))}
    curves = {rank: run.curves[named[rank]] for rank in sorted(named)}
    curves = {rank: curve for rank, curve in curves.items() if np.isfinite(curve.values).any()}
    if len(curves) < 2:
        return None
    steps = np.unique(np.concatenate([curve.steps[np.isfinite(curve.values)] for curve in curves.values()]))
    seconds = np.full((len(curves), len(steps)), np.nan)
    for row, curve in zip(seconds, curves.values(), strict=True):
        is_there = np.isin(curve.steps, steps)
        row[np.searchsorted(steps, curve.steps[is_there])] = curve.values[is_there]
    middles, means = _in_stretches(steps, seconds)
    return middles, [*curves], means


def _in_stretches(steps: Floats, rows: Floats) -> tuple[Floats, Floats]:
    """Return the middles of equal stretches of steps, and the means of each row's values in them.

    A line of metrics tells of the steps up to it: a stretch that has none is part of what the next one tells of.
    """
    num = min(_COLUMNS, len(steps))
    edges = np.linspace(steps[0], steps[-1], num + 1) if num > 1 else steps[0] + np.array([-0.5, 0.5])
    places = np.clip(np.searchsorted(edges, steps) - 1, 0, num - 1)
    is_known = np.isfinite(rows)
    sums = np.stack([np.bincount(places, row, num) for row in np.where(is_known, rows, 0.0)])
    counts = np.stack([np.bincount(places, own, num) for own in is_known])
    means = np.full(sums.shape, np.nan)
    np.divide(sums, counts, out=means, where=counts > 0)
    empty = np.flatnonzero(np.bincount(places, minlength=num) == 0)
    means[:, empty] = rows[:, np.searchsorted(places, empty)]
    return (edges[:-1] + edges[1:]) / 2, means


def _heat_map(steps: Floats, ranks: Sequence[int], seconds: Floats, ratios: Floats) -> dict[str, Any]:
    from bokeh.embed import json_item
    from bokeh.models import ColumnDataSource, HoverTool, LinearColorMapper
    from bokeh.models.annotations import ColorBar
    from bokeh.palettes import Blues256

    plot: Any = base_figure("step")
    without_axes(plot)
    width = float(steps[1] - steps[0]) if len(steps) > 1 else 1.0
    colours = LinearColorMapper(
        palette=Blues256[::-1], low=1.0, high=float(np.clip(np.nanmax(ratios), 1.5, _SLOWEST)), nan_color="#ffffff"
    )
    # All of it are columns: a page that follows a run exchanges these alone. Hovering looks up those of the image's
    # shape.
    columns = {"image": [ratios.astype(np.float32)], "seconds": [seconds.astype(np.float32)]}
    place = {"x": float(steps[0]) - width / 2, "y": ranks[0] - 0.5, "dw": width * len(steps), "dh": float(len(ranks))}
    source = ColumnDataSource({**columns, **{name: [value] for name, value in place.items()}})
    plot.image(**{name: name for name in ("image", *place)}, source=source, color_mapper=colours)
    rows = [("rank", "$y{0}"), ("step", "$x{0,0}"), ("times the median", "@image{%.3g}"), ("seconds", "@seconds{%.4g}")]
    plot.add_tools(HoverTool(tooltips=rows, formatters={"@image": "printf", "@seconds": "printf"}))
    plot.add_layout(ColorBar(color_mapper=colours, width=10, title="", background_fill_color=None), "right")
    plot.yaxis.axis_label = "rank"
    plot.yaxis.ticker.min_interval = 1
    plot.grid.visible = False
    return dict(json_item(plot))
