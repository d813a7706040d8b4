"""The verbs `report` and `compare`."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path

from hvdtrain.errors import ConfigError, counted, reason_of
from hvdtrain.rundir.directory import RunDirectory
from hvdtrain.settings.files import replaced_whole
from hvdtrain.verbs.options import CompareOptions, ReportOptions
from hvdtrain.verbs.report.differences import Divergence, differing, divergences, packed_environment, written
from hvdtrain.verbs.report.page import page_of
from hvdtrain.verbs.report.runs import ReadRun, read_runs
from hvdtrain.verbs.report.serve import LivePage, serve
from hvdtrain.verbs.report.shell import bokeh_source
from hvdtrain.verbs.report.sweeps import read_with_sweeps
from hvdtrain.verbs.watch.view import printable

_MOST_ROWS, _LONGEST = 60, 60
_ABOUT_DATA = "data."


def report(options: ReportOptions) -> int:
    """Answer `report RUN_DIR...`; returns the exit code.

    Raises:
        ConfigError: the library that draws is missing, a directory holds no run, or the page cannot be written or
            served.
    """
    bokeh = bokeh_source()
    if options.serve is not False:
        page = LivePage(lambda: read_with_sweeps(options.run_dirs), options.run_dirs, bokeh)
        return serve(page, int(options.serve) if options.serve is not True else 0, len(options.run_dirs))
    runs, about_sweeps = read_with_sweeps(options.run_dirs)
    output = options.output or RunDirectory(options.run_dirs[0]).report
    write_page(output, page_of(runs, bokeh, about_sweeps))
    for run in runs:
        for note in run.notes:
            sys.stdout.write(f"{printable(f'warning: {run.name}: {note}')}\n")
    sys.stdout.write(f"{output}: {output.stat().st_size / 1e6:.2f} MB, of {counted(len(runs), 'run')}\n")
    return 0


def write_page(path: Path, text: str) -> None:
    """Write a page, whole or not at all.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise OSError(0, "it is a directory")
        with replaced_whole(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written ({reason_of(error)}): name a file in a folder of yours, --output FILE"
        ) from error


def compare(options: CompareOptions) -> int:
    """Answer `compare RUN_A RUN_B`; returns the exit code.

    Raises:
        ConfigError: one of them holds no run.
    """
    a, b = read_runs(options.run_dirs)
    for line in compared(a, b):
        sys.stdout.write(f"{printable(line)}\n")  # what a file holds is nothing that a terminal obeys
    return 0


def compared(a: ReadRun, b: ReadRun) -> Iterator[str]:
    """Yield the lines that tell two runs apart."""
    yield f"A  {a.path}"
    yield f"B  {b.path}"
    for run, letter in ((a, "A"), (b, "B")):
        for note in run.notes:
            yield f"warning: {letter}: {note}"
    rows = differing([a.settings, b.settings], {"run_dir"})
    about_data = [row for row in rows if row[0].startswith(_ABOUT_DATA)]
    yield from _part("settings", [row for row in rows if row not in about_data], bool(a.settings and b.settings))
    yield from _part("data", about_data + _data_said(a, b), bool(a.settings and b.settings))
    environments = [packed_environment(run.environment) for run in (a, b)]
    yield from _part("versions and machines", differing(environments), all(environments))
    yield from _results(divergences(a, b))


def _data_said(a: ReadRun, b: ReadRun) -> list[tuple[str, list[str]]]:
    """Return what the runs said of their data when they were started, where that differs."""
    said = []
    for run in (a, b):
        lines = [line for record in run.records for line in record.text.splitlines() if line.startswith("data:")]
        said.append(" ".join(lines[-1].removeprefix("data:").split()) if lines else "-")
    return [("as read", said)] if said[0] != said[1] else []


def _part(title: str, rows: list[tuple[str, list[str]]], is_known: bool) -> Iterator[str]:
    yield ""
    if not rows:
        yield f"{title}: {'the same' if is_known else 'not known of both'}"
        return
    yield f"{title}:"
    width = max(len(name) for name, _ in rows[:_MOST_ROWS])
    for name, values in rows[:_MOST_ROWS]:
        left, right = (written(value) for value in values)
        if max(len(left), len(right)) > _LONGEST:
            yield f"  {name}\n    A: {left}\n    B: {right}"
        else:
            yield f"  {name:{width}}  {left}  ->  {right}"
    if len(rows) > _MOST_ROWS:
        yield f"  and {len(rows) - _MOST_ROWS} more"


def _results(found: list[Divergence]) -> Iterator[str]:
    yield ""
    if not found:
        yield "results: no metric was logged by both at the same step"
        return
    different = [item for item in found if item.first_different is not None]
    if not different:
        yield f"results: the same to the last bit, in {counted(len(found), 'metric')} up to step {_last(found):,}"
        return
    first = min(item.first_different or 0 for item in different)
    equals = [item.last_equal for item in found if item.last_equal is not None and item.last_equal < first]
    equal = max(equals, default=None)
    since = f", the same to the last bit up to step {equal:,}" if equal is not None else ""
    yield f"results: differ from step {first:,} on{since}"
    width = max(len(item.metric) for item in found[:_MOST_ROWS])
    for item in sorted(found, key=lambda item: item.first_different or math.inf)[:_MOST_ROWS]:
        yield f"  {item.metric:{width}}  {_in_words(item)}"


def _last(found: list[Divergence]) -> int:
    return max(item.last_equal or 0 for item in found)


def _in_words(item: Divergence) -> str:
    if item.first_different is None:
        return f"the same at all {counted(item.num_common, 'common step')}"
    left, right = item.values
    apart = f"at most {item.largest:.2%} apart, at" if math.isfinite(item.largest) else "one is zero or not finite at"
    return f"from step {item.first_different:,}: {left:.7g} -> {right:.7g}; {apart} step {item.largest_at:,}"
