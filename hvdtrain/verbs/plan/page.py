"""A plan as `plan.html`, with two plots. No libraries: the page needs no network."""

from __future__ import annotations

import html
from pathlib import Path

from hvdtrain.verbs.kit import counted
from hvdtrain.verbs.plan.answer import Answer
from hvdtrain.verbs.plan.plot import plot
from hvdtrain.verbs.plan.report import describe, table
from hvdtrain.verbs.plan.saved import write_output

_STYLE = "body{font:15px sans-serif;margin:2em;color:#222}pre{font:13px monospace}svg{margin:1em 2em 1em 0}"


def save_html(path: Path, answer: Answer) -> None:
    """Write a page with the table and two plots: throughput against workers, time to the same loss against cost."""
    facts = answer.facts
    plots = [_throughput(answer), *([_time_against_cost(answer)] if facts.noise is not None else [])]
    workers = counted(answer.recommended.workers, "worker") if answer.recommended else "no recommendation"
    body = f"<pre>{html.escape(describe(facts))}\n\n{html.escape(table(answer))}</pre>"
    write_output(
        path,
        "<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'><title>hvdtrain plan</title>"
        f"<style>{_STYLE}</style></head><body>"
        f"<h1>{html.escape(facts.recipe)}: {workers}</h1>"
        f"{''.join(plots)}{body}</body></html>\n",
    )


def _throughput(answer: Answer) -> str:
    facts, rows, best = answer.facts, answer.rows, answer.recommended
    units_per_step = facts.micro_batch_size * facts.accum_steps * facts.units_per_sample
    measured = facts.measured_steps_s.items()
    return plot(
        f"Throughput ({facts.unit}/s)",
        "workers",
        lines={
            "ideal": [(row.workers, rows[0].units_per_s * row.workers) for row in rows],
            "predicted": [(row.workers, row.units_per_s) for row in rows],
        },
        points=[(n, n * units_per_step / seconds) for n, seconds in measured if n <= rows[-1].workers],
        marked=None if best is None else (best.workers, best.units_per_s),
    )


def _time_against_cost(answer: Answer) -> str:
    known = [row for row in answer.rows if row.relative_time is not None]
    points = [(row.workers * (row.relative_time or 0), row.relative_time or 0) for row in known]
    return plot(
        "Time to the same loss (one worker = 1)",
        "worker-hours to the same loss (one worker = 1)",
        lines={"predicted": points},
        points=[],
        marked=None if answer.recommended is None else points[known.index(answer.recommended)],
        labels=[str(row.workers) for row in known],
    )
