"""The page of runs: what is in it, and in which order."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence

import numpy as np

from hvdtrain import __version__
from hvdtrain.errors import counted
from hvdtrain.verbs.report.charts import MOST_POINTS, Chart, charts_of, draw, look_of, style_of, usual_range
from hvdtrain.verbs.report.differences import differing, packed_environment
from hvdtrain.verbs.report.events import KINDS, Event, events_of
from hvdtrain.verbs.report.figures import plain
from hvdtrain.verbs.report.rank_log import last_words, warnings
from hvdtrain.verbs.report.runs import ReadRun
from hvdtrain.verbs.report.series import Places
from hvdtrain.verbs.report.shell import Figure, chip, escape, figures_of, framed, legend
from hvdtrain.verbs.report.tables import events_table, fields_table, side_by_side, summary_table
from hvdtrain.verbs.report.time_figures import time_figures

MOST_BYTES = 1_500_000
# What else a page holds of a run's texts, in characters.
_MOST_TEXT, _MOST_OF_LOG = 20_000, 60_000
_MOST_NAMES = 12


def page_of(runs: Sequence[ReadRun], bokeh: str, preface: str = "") -> str:
    """Return the report of runs, at most 1.5 MB unless they have that much text.

    Args:
        runs: one or more.
        bokeh: the source of BokehJS.
        preface: HTML that stands above all else.
    """
    most = MOST_POINTS
    while True:
        page = _page(runs, bokeh, most, preface)
        if len(page.encode()) <= MOST_BYTES or most < MOST_POINTS // 16:
            return page
        most //= 2


def _page(runs: Sequence[ReadRun], bokeh: str, most_points: int, preface: str) -> str:
    places = [Places.of(run) for run in runs]
    events = [events_of(run) for run in runs]
    charts, num_left_out = charts_of(runs)
    items = draw(charts, places, events, most_points)
    figures = [Figure(chart.title, item, _caption(chart)) for chart, item in zip(charts, items, strict=True)]
    figures += time_figures(runs, places)
    settings = {"axes": _axes(places), "ranges": [usual_range(chart) for chart in charts]}
    title = runs[0].name if len(runs) == 1 else counted(len(runs), "run")
    body = [
        f"<header><h1>{escape(title)}</h1>{_subtitle(runs)}</header><main>",
        *_notes(runs),
        preface,
        *_differences(runs),
        *_summary(runs, places),
        *_charts(runs, figures, events, places, num_left_out),
        *_texts(runs, events),
        "</main>",
    ]
    return framed(title, "report", body, figures, settings, bokeh)


def _subtitle(runs: Sequence[ReadRun]) -> str:
    if len(runs) > 1:
        names = ", ".join(run.name for run in runs[:_MOST_NAMES])
        return f"<p class='soft'>{escape(names)}{' and more' if len(runs) > _MOST_NAMES else ''}</p>"
    greeting = runs[0].records[0].text.splitlines() if runs[0].records else []
    return f"<p class='soft'>{escape(greeting[0])}</p>" if greeting else ""


def _notes(runs: Sequence[ReadRun]) -> Iterator[str]:
    notes = [note for run in runs for note in run.notes]
    if notes:
        items = "".join(f"<li>{escape(note)}</li>" for note in notes[:50])
        yield f"<section class='notes' aria-label='What could not be read'><ul>{items}</ul></section>"


def _differences(runs: Sequence[ReadRun]) -> Iterator[str]:
    if len(runs) < 2:
        return
    yield "<h2>What differs</h2>"
    rows = [
        *differing([run.settings for run in runs], {"run_dir"}),
        *differing([packed_environment(run.environment) for run in runs]),
    ]
    names = [run.name for run in runs]
    yield side_by_side(names, rows) if rows else "<p>Settings, versions and machines are the same.</p>"


def _summary(runs: Sequence[ReadRun], places: Sequence[Places]) -> Iterator[str]:
    yield "<h2>Results</h2>"
    yield summary_table(runs, places)


def _charts(
    runs: Sequence[ReadRun],
    figures: Sequence[Figure],
    events: Sequence[Sequence[Event]],
    places: Sequence[Places],
    num_left_out: int,
) -> Iterator[str]:
    yield "<h2>Curves</h2>"
    if not figures:
        yield "<p>No metrics have been logged.</p>"
        return
    radios = "".join(
        f"<label><input type='radio' name='axis' value='{name}'{' checked' * (name == 'step')}>{axis['name']}</label>"
        for name, axis in _axes(places).items()
    )
    yield f"<fieldset><legend>Along the bottom</legend>{radios}</fieldset>"
    yield (
        "<fieldset><legend>Up the side</legend><label><input type='checkbox' name='usual'>"
        "98 % of the values only: a spike may go beyond</label></fieldset>"
    )
    if len(runs) > 1:
        boxes = "".join(_box(i, run) for i, run in enumerate(runs))
        yield f"<fieldset><legend>Runs</legend>{boxes}</fieldset>"
    kinds = {event.kind for own in events for event in own}
    if kinds:
        signs = "".join(f"<span>{sign} {name}</span>" for kind, (name, _, sign) in KINDS.items() if kind in kinds)
        yield f"<p class='soft events'>Marks on the curves: {signs}</p>"
    yield from figures_of(figures)
    if num_left_out:
        yield f"<p class='soft'>{counted(num_left_out, 'more metric')} of these runs: see metrics.jsonl.</p>"


def _box(number: int, run: ReadRun) -> str:
    """Return what shows and hides a run, with the look of its curves."""
    box = f"<input type='checkbox' name='run' value='{number}' checked>"
    return f"<label>{box}{chip(*look_of(number))}{escape(run.name)}</label>"


def _caption(chart: Chart) -> str:
    """Return the legend of a chart and what can be seen in it, for those who do not."""
    items = []
    for line in chart.lines:
        values, steps = line.curve.values, line.curve.steps
        finite = np.flatnonzero(np.isfinite(values))
        said = "no finite value"
        if finite.size:
            low, high, last = finite[values[finite].argmin()], finite[values[finite].argmax()], finite[-1]
            said = (
                f"{values[last]:.5g} at step {steps[last]:,.0f}; lowest {values[low]:.5g} at {steps[low]:,.0f},"
                f" highest {values[high]:.5g} at {steps[high]:,.0f}"
            )
        label = f"{escape(line.label)}: " if line.label else ""
        items.append((*style_of(line, chart), label + said))
    return legend(items)


def _axes(places: Sequence[Places]) -> dict[str, dict[str, str]]:
    axes = {"step": {"name": "Steps", "label": "step", "format": "0,0.[00]"}}
    units = {own.unit for own in places if own.unit}
    if units:
        unit = " or ".join(sorted(units))
        axes["units"] = {
            "name": escape(unit.capitalize()),
            "label": f"{plain(unit)} seen, all ranks",
            "format": "0.[000]a",
        }
    if any(own.seconds[-1] > 0 for own in places):
        label = "time in training, without evaluations and saves (h:min:s)"
        axes["seconds"] = {"name": "Time", "label": label, "format": "00:00:00"}
    return axes


def _texts(runs: Sequence[ReadRun], events: Sequence[Sequence[Event]]) -> Iterator[str]:
    share = max(1, len(runs))
    for run, own in zip(runs, events, strict=True):
        of_run = f" of {escape(run.name)}" if len(runs) > 1 else ""
        said = last_words(run.records)[: _MOST_TEXT // share]
        if said:
            yield f"<h2>Samples and last words{of_run}</h2><pre>{escape(said)}</pre>"
        warned = [text for _, text in warnings(run.records)]
        if warned:
            text = "\n".join(warned)[-_MOST_TEXT // share :]
            yield _details(f"{counted(len(warned), 'warning')}{of_run}", f"<pre>{escape(text)}</pre>", prints=True)
        if own:
            yield _details(f"Events{of_run}", events_table(own))
        if run.settings:
            yield _details(f"Settings{of_run}", fields_table(run.settings), prints=True)
        if run.environment:
            yield _details(f"Environment{of_run}", fields_table(packed_environment(run.environment)), prints=True)
        if run.records:
            text = "\n".join(f"{record.time} {record.text}" for record in run.records)[-_MOST_OF_LOG // share :]
            yield _details(f"Log of rank 0{of_run}", f"<pre>{escape(text)}</pre>")
    yield f"<p class='soft'>Written by hvdtrain {html.escape(__version__)}; curves by Bokeh. Nothing is fetched.</p>"


def _details(title: str, content: str, prints: bool = False) -> str:
    return f"<details{' data-print' * prints}><summary>{title}</summary>{content}</details>"
