"""Chromium without a window: what a page says on its console, what it becomes, what it looks like."""

import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass

from debian import why_without

# It is run as root, in containers, and asks for nothing on its own behalf.
OPTIONS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
OPTIONS += ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
DARK = ["--blink-settings=preferredColorScheme=0"]
# BokehJS tells its level and when it is idle.
_CHATTER = re.compile(r"\[bokeh [\d.]+\] (setting log level|document idle)")


def why_no_browser():
    """Return why there is no Chromium, "" where there is one, installed if need be."""
    return "" if shutil.which("chromium") else why_without(["chromium"], ["chromium"])


@dataclass
class Visit:
    """What became of a page."""

    dom: str
    console: list[str]
    """What it said, but for BokehJS's greetings: errors, warnings, refused requests."""
    asked_for: list[str]
    """Addresses of which the page, or anything in it, asked."""


def visit(page, folder, width=1280, *, is_dark=False, screenshot=None):
    """Open a page, a file or an address; returns what became of it once it was quiet."""
    log = folder / "net.json"
    shape = [f"--window-size={width},2400", "--virtual-time-budget=30000", f"--user-data-dir={folder / 'profile'}"]
    wanted = [f"--screenshot={screenshot}"] if screenshot else ["--dump-dom"]
    logging = ["--enable-logging=stderr", f"--log-net-log={log}", *(DARK if is_dark else [])]
    done = subprocess.run(
        ["chromium", *OPTIONS, *shape, *wanted, *logging, page if str(page).startswith("http:") else f"file://{page}"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "HOME": str(folder)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = [line for line in done.stderr.splitlines() if ":CONSOLE" in line and not _CHATTER.search(line)]
    shutil.rmtree(folder / "profile", ignore_errors=True)
    return Visit(done.stdout, said, _addresses(log))


def _addresses(log):
    """Return the addresses in a log of Chromium's network."""
    text = log.read_text()
    try:
        events = json.loads(text)["events"]
    except ValueError:  # it was cut off at the end
        events = json.loads(text[: text.rindex("\n")].rstrip().rstrip(",") + "]}")["events"]
    return [params["url"] for event in events if "url" in (params := event.get("params", {}))]
