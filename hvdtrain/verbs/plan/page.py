"""A plan as `plan.html`: what is recommended, the charts and the table, in the frame of the reports."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from hvdtrain import __version__
from hvdtrain.errors import ConfigError, counted
from hvdtrain.verbs.plan.answer import Answer
from hvdtrain.verbs.plan.charts import charts_of, step_interval
from hvdtrain.verbs.plan.limits import difference
from hvdtrain.verbs.plan.report import describe
from hvdtrain.verbs.plan.rows import Row
from hvdtrain.verbs.plan.saved import write_output
from hvdtrain.verbs.report.shell import bokeh_source, escape, figures_of, framed
from hvdtrain.verbs.report.tables import plain_table


def save_html(path: Path, answer: Answer) -> str:
    """Write the page; returns what is missing in it, in words, "" if nothing is.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        bokeh, missing = bokeh_source(), ""
    except ConfigError:
        bokeh, missing = "", f"{path} has the table only: charts take Bokeh, which is not installed: pip install bokeh"
    write_output(path, page_of(answer, bokeh))
    return missing


def page_of(answer: Answer, bokeh: str) -> str:
    """Return the page; without Bokeh's source without charts."""
    best = answer.recommended
    workers = counted(best.workers, "worker") if best else "no recommendation"
    title = f"{answer.facts.recipe}: {workers}"
    figures = charts_of(answer) if bokeh else []
    body = [
        f"<header><h1>{escape(title)}</h1><p>{escape(_sentence(answer.reason))}</p></header><main>",
        f"<p>What limits: {escape(answer.limit)}.</p>",
        *(f"<p class='notes'>{escape(_sentence(text))}</p>" for text in [answer.unknown] if text),
        "<h2>Predicted</h2>",
        *(figures_of(figures) if figures else ["<p class='soft'>Charts take Bokeh: pip install bokeh.</p>"]),
        "<h2>By workers</h2>",
        _table(answer),
        *_changes(answer),
        f"<h2>Measured</h2><pre>{escape(describe(answer.facts))}</pre>",
        f"<p class='soft'>Written by hvdtrain {escape(__version__)}; charts by Bokeh. Nothing is fetched.</p>",
        "</main>",
    ]
    return framed(title, "plan", body, figures, {}, bokeh)


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:].rstrip('.')}."


def _table(answer: Answer) -> str:
    unit = answer.facts.unit
    heads = ["workers", "ms a step", f"{unit}/s", "efficiency", "waits for the network", "global batch"]
    heads += ["steps", "time to the same loss"] * (answer.facts.noise is not None)
    heads += ["hours", "worker-hours"] * (answer.rows[0].hours is not None)
    heads += ["cost"] * (answer.rows[0].cost is not None)
    heads += ["measured, ms a step"] * bool(answer.facts.measured_steps_s)
    rows = [[*_cells(answer, row)] for row in answer.rows]
    return plain_table(heads, rows, "What is predicted by number of workers")


def _cells(answer: Answer, row: Row) -> Iterator[str]:
    low, high = (1e3 * seconds for seconds in step_interval(row))
    yield f"{row.workers:,}{' ✓ recommended' * (row == answer.recommended)}"
    yield f"{1e3 * row.step.total_s:,.4g} [{low:,.4g}, {high:,.4g}]"
    yield f"{row.units_per_s:,.0f}"
    yield f"{row.efficiency:.0%}"
    yield f"{row.exposed_share:.0%}"
    yield f"{row.global_batch:,}"
    if answer.facts.noise is not None:
        is_known = row.relative_time is not None
        yield f"{row.relative_steps:.3f}" if is_known else ""
        yield f"{row.relative_time:.3f} [{row.time_low:.3f}, {row.time_high:.3f}]" if is_known else ""
    if answer.rows[0].hours is not None:
        yield "" if row.hours is None else f"{row.hours:,.3g}"
        yield "" if row.worker_hours is None else f"{row.worker_hours:,.3g}"
    if answer.rows[0].cost is not None:
        yield "" if row.cost is None else f"{row.cost:,.2f}"
    if answer.facts.measured_steps_s:
        measured = answer.facts.measured_steps_s.get(row.workers)
        yield "" if measured is None else f"{1e3 * measured:,.4g}"


def _changes(answer: Answer) -> Iterator[str]:
    if answer.changes:
        changes = sorted(answer.changes, key=lambda change: change[1])
        rows = [(name, difference(factor)) for name, factor in changes]
        yield f"<h2>What would change it, on {counted(answer.changed_workers, 'worker')}</h2>"
        yield plain_table(["with", "time to the same loss"], rows, "Settings and what they would do")
