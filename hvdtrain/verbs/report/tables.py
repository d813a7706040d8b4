"""The tables of a page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hvdtrain.settings.units import duration
from hvdtrain.trainer.utilization import METRIC as MFU
from hvdtrain.verbs.report.differences import written
from hvdtrain.verbs.report.events import KINDS, Event
from hvdtrain.verbs.report.runs import ReadRun
from hvdtrain.verbs.report.series import Places
from hvdtrain.verbs.report.shell import escape

_LONGEST = 400
_MOST_ROWS = 1000


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "…"


def summary_table(runs: Sequence[ReadRun], places: Sequence[Places]) -> str:
    """Return a table of what each run has reached, which can be sorted."""
    speeds = sorted({n for run in runs for n in run.curves if n.startswith("throughput/")}, reverse=True)
    scores = sorted({n for run in runs for n in run.curves if n.startswith("val/") and n != "val/loss"})[:4]
    heads = ["run", "steps", "state", "training loss, last", "held-out loss, last", "held-out loss, best", "at step"]
    heads += [f"held-out {name[4:].replace('_', ' ')}, last" for name in scores]
    heads += [_head_of(name) for name in speeds]
    heads += ["time in training", "ranks"]
    rows = []
    for run, place in zip(runs, places, strict=True):
        low, at = _lowest(run, "val/loss")
        cells = [_cell(run.name), _cell(run.last_step), _cell(_state(run))]
        cells += [_number(run.last("train/loss")), _number(run.last("val/loss")), _number(low), _cell(at)]
        cells += [_number(run.last(name)) for name in scores]
        cells += [_number(_median(run, name)) for name in speeds]
        seconds = float(place.seconds[-1])
        ranks = run.environment.get("ranks")
        cells += [f"<td data-value='{seconds}'>{duration(seconds)}</td>" if seconds else _cell("")]
        cells += [_cell(len(ranks) if isinstance(ranks, list) else "")]
        rows.append("".join(cells))
    head = "".join(f"<th scope='col'><button type='button'>{escape(name)}</button></th>" for name in heads)
    return _table(f"<tr>{head}</tr>", rows, "What the runs have reached")


def _head_of(speed: str) -> str:
    if speed == MFU:
        return "MFU, median"
    return f"{speed.partition('/')[2].replace('_per_s', '').replace('_', ' ')}/s, median"


def side_by_side(names: Sequence[str], rows: Sequence[tuple[str, Sequence[Any]]]) -> str:
    """Return a table of fields by run."""
    head = "".join(f"<th scope='col'>{escape(name)}</th>" for name in ("", *names))
    body = [
        f"<th scope='row'>{escape(name)}</th>{''.join(_cell(_short(written(v))) for v in values)}"
        for name, values in rows[:_MOST_ROWS]
    ]
    return _table(f"<tr>{head}</tr>", body, "What differs between the runs")


def plain_table(heads: Sequence[str], rows: Sequence[Sequence[object]], label: str) -> str:
    """Return a table as it is given."""
    head = "".join(f"<th scope='col'>{escape(name)}</th>" for name in heads)
    body = ["".join(_cell(cell) for cell in row) for row in rows[:_MOST_ROWS]]
    return _table(f"<tr>{head}</tr>", body, label)


def fields_table(values: Mapping[str, Any]) -> str:
    """Return a table of names and values."""
    rows = [f"<th scope='row'>{escape(n)}</th>{_cell(_short(written(v)))}" for n, v in [*values.items()][:_MOST_ROWS]]
    return _table("", rows, "Names and values")


def events_table(events: Sequence[Event]) -> str:
    """Return a table of events."""
    rows = [f"{_cell(e.step)}{_cell(f'{KINDS[e.kind][2]} {KINDS[e.kind][0]}')}{_cell(e.text)}" for e in events]
    head = "".join(f"<th scope='col'>{name}</th>" for name in ("step", "what", "more"))
    return _table(f"<tr>{head}</tr>", rows, "Events")


def _table(head: str, rows: Sequence[str], label: str) -> str:
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return (
        f"<div class='scroll' tabindex='0' role='region' aria-label='{label}'><table>"
        f"<thead>{head}</thead><tbody>{body}</tbody></table></div>"
    )


def _cell(value: object) -> str:
    if isinstance(value, int):
        return f"<td data-value='{value}'>{value:,}</td>"
    return f"<td>{escape(value)}</td>"


def _number(value: float | None) -> str:
    if value is None:
        return "<td data-value=''></td>"
    if not math.isfinite(value):
        return "<td data-value=''>not finite</td>"
    text = f"{value:,.0f}" if 1e4 <= abs(value) < 1e12 else f"{value:.4g}"
    return f"<td data-value='{value!r}'>{text}</td>"


def _lowest(run: ReadRun, metric: str) -> tuple[float | None, int | str]:
    curve = run.curves.get(metric)
    if curve is None or not np.isfinite(curve.values).any():
        return None, ""
    place = int(np.nanargmin(curve.values))
    return float(curve.values[place]), int(curve.steps[place])


def _median(run: ReadRun, metric: str) -> float | None:
    curve = run.curves.get(metric)
    if curve is None or not np.isfinite(curve.values).any():
        return None
    return float(np.nanmedian(curve.values))


def _state(run: ReadRun) -> str:
    if run.events and run.events[-1][1] == "finished":
        return "finished"
    planned = run.settings.get("train.steps")
    return f"of {planned:,}" if isinstance(planned, int) else "not finished"
