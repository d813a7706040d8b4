"""`plan.html`: charts in the frame of the reports, each with its interval, and a table that needs none of them."""

import base64
import json
import math
import struct
import sys

import pytest
from test_plan import facts

from hvdtrain.verbs.plan.answer import answer
from hvdtrain.verbs.plan.charts import charts_of, step_interval
from hvdtrain.verbs.plan.page import page_of, save_html

bokeh = pytest.importorskip("bokeh")

MEASURED = {1: 0.1, 2: 0.14}


def columns_of(figure):
    """Return the columns of each source of a figure, by the names of its columns."""
    sources = []

    def look(value):
        if isinstance(value, dict):
            if value.get("name") == "ColumnDataSource":
                entries = value["attributes"]["data"]["entries"]
                sources.append({name: plain(column) for name, column in entries})
            for one in value.values():
                look(one)
        elif isinstance(value, list):
            for one in value:
                look(one)

    look(figure.item["doc"])
    return sources


def plain(column):
    if isinstance(column, dict) and column.get("type") == "ndarray":
        data = base64.b64decode(column["array"]["data"]) if isinstance(column["array"], dict) else column["array"]
        code = {"float64": "d", "int32": "i", "float32": "f"}[column["dtype"]]
        return [*struct.unpack(f"<{len(data) // struct.calcsize(code)}{code}", data)]
    return column


def having(figure, *names):
    return next(columns for columns in columns_of(figure) if set(names) <= set(columns))


def test_intervals_are_drawn_where_they_are_computed():
    given = answer(facts(measured_steps_s=MEASURED), 16)
    throughput, step, loss = charts_of(given)
    assert [figure.title for figure in (throughput, step, loss)] == [
        "Throughput, tokens a second",
        "Time of a step, milliseconds",
        "Time to the same loss against its cost",
    ]
    rows = given.rows
    drawn = having(step, "low", "high", "waiting")
    assert drawn["workers"] == [row.workers for row in rows]
    for place, row in enumerate(rows):
        low, high = step_interval(row)
        assert (drawn["low"][place], drawn["high"][place]) == pytest.approx((1e3 * low, 1e3 * high))
        assert high / row.step.total_s - 1 == pytest.approx(row.error)
    of_units = having(throughput, "low", "high", "ideal")
    for low, value, high in zip(of_units["low"], of_units["y"], of_units["high"], strict=True):
        assert low < value < high
    times = having(loss, "cost_low", "cost_high")
    assert times["low"] == pytest.approx([row.time_low for row in rows])
    assert times["cost_high"] == pytest.approx([row.workers * row.time_high for row in rows])
    measured = next(columns for columns in columns_of(step) if columns.get("workers") == [1, 2])
    assert measured["y"] == pytest.approx([100, 140])
    assert "in nine of ten cases" in step.caption
    assert "measured, on 1, 2 workers" in step.caption


def test_it_stands_alone_and_is_no_markup(tmp_path):
    given = answer(facts(recipe="<mine>", measured_steps_s=MEASURED), 16, price=2.0)
    assert save_html(tmp_path / "plan.html", given) == ""
    page = (tmp_path / "plan.html").read_text()
    assert "<mine>" not in page
    assert page.count("<figure") == 3
    assert "default-src 'none'" in page
    assert "https:" not in page
    assert len(page) < 600_000
    for row in given.rows:
        assert f"{1e3 * row.step.total_s:,.4g} [" in page
    assert "✓ recommended" in page


def test_what_is_not_known_is_left_out():
    alone = answer(facts(network=None, noise=None), 8)
    page = page_of(alone, "x")
    assert page.count("<figure") == 2
    assert "the network between hosts, which was not measured" in page
    assert "time to the same loss" not in page.partition("By workers")[2].partition("</table>")[0]


@pytest.mark.parametrize("spread", [0.0, 3.0])
def test_a_machine_without_rest_has_an_interval_without_end_or_none(spread):
    """No bound is zero, which has no logarithm, and all are numbers."""
    for figure in charts_of(answer(facts(spread=spread), 4)):
        for columns in columns_of(figure):
            for name, values in columns.items():
                numbers = [value for value in values if isinstance(value, float)]
                assert all(map(math.isfinite, numbers)), name
                assert name in ("waiting", "none") or all(value > 0 for value in numbers), name


def test_without_bokeh_there_is_the_table_and_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bokeh.resources", None)
    given = answer(facts(), 4)
    assert "pip install bokeh" in save_html(tmp_path / "plan.html", given)
    page = (tmp_path / "plan.html").read_text()
    assert "<figure" not in page
    assert "pip install bokeh" in page
    assert f"{given.rows[-1].units_per_s:,.0f}" in page
    assert json.dumps(given.as_dict())
