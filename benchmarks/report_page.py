"""How long does it take to open a report of a long run, and of many ranks, in a real browser?

    python benchmarks/report_page.py

Runs are made up by a generator of metrics. Each page is opened in a Chromium that was just started, with an empty
cache, on a screen of 1280 pixels and on one of 390. The time is from the navigation to the first curves on the screen,
and to the last ones, by the browser's own clock; beside it stands the processor time that the page's thread takes for
all, which other work on the machine does not lengthen.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks"), str(REPOSITORY / "tests" / "support")]

import machine  # noqa: E402
from browser import SETTLED, Chromium, why_no_browser  # noqa: E402
from made_runs import make_run  # noqa: E402

from hvdtrain.verbs.report.page import page_of  # noqa: E402
from hvdtrain.verbs.report.runs import read_run  # noqa: E402
from hvdtrain.verbs.report.shell import bokeh_source  # noqa: E402

# What is made up: lines of metrics, ranks.
RUNS = {"100,000 logged steps, 2 ranks": (100_000, 2), "2,000 logged steps, 64 ranks": (2_000, 64)}
RUNS["100,000 logged steps, 64 ranks"] = (100_000, 64)
MARKS = "Object.fromEntries(performance.getEntriesByType('mark').map((mark) => [mark.name, mark.startTime]))"


def opened(page: Path, folder: Path, width: int) -> dict[str, float]:
    """Return when the first and the last curves were on the screen, in ms since the navigation, and the cost."""
    with Chromium(folder) as browser:
        tab = browser.tab(width, 900)
        tab.send("Performance.enable", timeDomain="threadTicks")
        tab.send("Page.navigate", url=f"file://{page}")
        tab.until(SETTLED)
        assert tab.said == [line for line in tab.said if "[bokeh" in line], tab.said
        metrics = {one["name"]: one["value"] for one in tab.send("Performance.getMetrics")["metrics"]}
        return dict(tab.value(MARKS)) | {"processor time": 1e3 * metrics["TaskDuration"]}


def main() -> None:
    """Measure, print and write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="a page is opened so often")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    if reason := why_no_browser():
        sys.exit(reason)
    lines = [machine.describe(), "", f"each page opened {given.repeats} times: median and quartiles, seconds"]
    with tempfile.TemporaryDirectory() as folder:
        for name, (steps, ranks) in RUNS.items():
            run = make_run(Path(folder) / name, lines=steps, every=1, ranks=ranks, slow_rank=1, spike_at=steps // 3)
            started = time.perf_counter()
            read = read_run(run)
            read_s, started = time.perf_counter() - started, time.perf_counter()
            text = page_of([read], bokeh_source())
            drawn_s = time.perf_counter() - started
            page = Path(folder) / "page.html"
            page.write_text(text)
            size, metrics = page.stat().st_size / 1e6, (run / "metrics.jsonl").stat().st_size / 1e6
            lines += ["", f"{name}: {metrics:.0f} MB of metrics read in {read_s:.1f} s, drawn in {drawn_s:.1f} s"]
            lines.append(f"  page                         {size:.2f} MB")
            for width in (1280, 390):
                marks = [opened(page, Path(folder), width) for _ in range(given.repeats)]
                for mark in ("first curves", "all curves", "processor time"):
                    seconds = [one[mark] / 1e3 for one in marks]
                    what = f"{mark}, {width} pixels"
                    lines.append(f"  {what:28} {machine.spread(seconds, 2)}, at most {max(seconds):.2f}")
            print("\n".join(lines[-6:]), flush=True)
    table = "\n".join(lines)
    if given.output:
        given.output.write_text(table + "\n")


if __name__ == "__main__":
    main()
