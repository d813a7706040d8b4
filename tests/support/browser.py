"""Chromium without a window, driven by the DevTools protocol: what a page says, what it becomes, what it looks like.

The protocol sets the size of the screen, its pixels and its touch, as a phone has them: a window of Chromium's own is
never narrower than 500 pixels. It is spoken over a pipe, messages of JSON that end with a zero.
"""

import base64
import contextlib
import json
import os
import re
import select
import shutil
import subprocess
import time
from dataclasses import dataclass

from debian import why_without

# It is run as root, in containers, and asks for nothing on its own behalf.
OPTIONS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
OPTIONS += ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
OPTIONS += ["--remote-debugging-pipe"]
# BokehJS tells its level and when it is idle.
_CHATTER = re.compile(r"\[bokeh [\d.]+\] (setting log level|document idle)")
# A phone is so wide at most, and is touched.
_PHONE = 600
# Loaded, drawn, and whatever script of a test's is in it has come to its end.
SETTLED = """
document.readyState === "complete"
  && (!document.getElementById("charts") || !!document.documentElement.dataset.ready
      || !document.getElementById("trouble").hidden)
  && (!document.documentElement.outerHTML.includes('"found"') || !!document.getElementById("found")?.textContent)
"""


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
    found: object = None
    """What the expression came to."""


def visit(page, folder, width=1280, *, is_dark=False, screenshot=None, height=2400, expression=None, timeout=120):
    """Open a page, a file or an address; returns what became of it once it was quiet.

    Args:
        screenshot: a file for a picture of what the screen shows.
        expression: JavaScript whose value, or that of its promise, is wanted of the page once it has settled.
    """
    with Chromium(folder) as browser:
        tab = browser.tab(width, height, is_dark)
        tab.send("Page.navigate", url=page if str(page).startswith("http:") else f"file://{page}")
        tab.until(SETTLED, timeout)
        before = None
        while before != (before := tab.value("document.documentElement.outerHTML")):  # nothing changes any more
            tab.listen(0.7)
        found = tab.value(expression) if expression else None
        if screenshot:
            picture = tab.send("Page.captureScreenshot", format="png")["data"]
            screenshot.write_bytes(base64.b64decode(picture))
    said = [line for line in tab.said if not _CHATTER.search(line)]
    return Visit(before, said, tab.asked_for, found)


class Chromium:
    """A browser with a profile of its own, which ends with the block."""

    def __init__(self, folder):
        self._profile = folder / "profile"
        self._options = [*OPTIONS, f"--user-data-dir={self._profile}"]
        self._number, self._rest = 0, b""
        self._answers, self.listeners = {}, []

    def __enter__(self):
        (theirs_in, self._out), (self._in, theirs_out) = os.pipe(), os.pipe()
        # The pipe's ends are file descriptors 3 and 4 there.
        script = f'exec chromium "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self._process = subprocess.Popen(
            ["bash", "-c", script, "chromium", *self._options],
            pass_fds=(theirs_in, theirs_out),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "HOME": str(self._profile.parent)},
        )
        os.close(theirs_in)
        os.close(theirs_out)
        return self

    def __exit__(self, *exception):
        with contextlib.suppress(OSError, AssertionError):
            self.send("Browser.close")
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._in)
        os.close(self._out)
        shutil.rmtree(self._profile, ignore_errors=True)

    def tab(self, width, height, is_dark=False):
        """Return a tab of this size, which says what it says from now on."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        tab = Tab(self, self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"])
        for domain in ("Page", "Runtime", "Log", "Network"):
            tab.send(f"{domain}.enable")
        tab.resize(width, height)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        tab.send("Emulation.setEmulatedMedia", features=[scheme])
        return tab

    def send(self, method, session=None, timeout=120, **params):
        """Send a command; returns its answer."""
        self._number += 1
        number = self._number
        message = {"id": number, "method": method, "params": params} | ({"sessionId": session} if session else {})
        os.write(self._out, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + timeout
        while number not in self._answers:
            assert time.monotonic() < deadline, f"Chromium has not answered {method}"
            assert self.listen(1.0), f"Chromium has ended before it answered {method}"
        answer = self._answers.pop(number)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def listen(self, seconds):
        """Take what it says within so many seconds; returns whether it still can."""
        if not select.select([self._in], [], [], seconds)[0]:
            return True
        new = os.read(self._in, 1 << 20)
        *messages, self._rest = (self._rest + new).split(b"\0")
        for message in map(json.loads, messages):
            if "id" in message:
                self._answers[message["id"]] = message
            for listener in self.listeners:
                listener(message)
        return bool(new)


class Tab:
    """A page in a browser."""

    def __init__(self, browser, session):
        self._browser, self._session = browser, session
        self.said, self.asked_for = [], []
        browser.listeners.append(self._hear)

    def send(self, method, **params):
        """Send a command to it; returns the answer."""
        return self._browser.send(method, self._session, **params)

    def resize(self, width, height):
        """Give it the screen of a phone, or of a desktop, by its width."""
        is_phone = width < _PHONE
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=is_phone
        )
        self.send("Emulation.setTouchEmulationEnabled", enabled=is_phone)

    def value(self, expression):
        """Return the value of an expression, or that of its promise."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def until(self, expression, timeout=120):
        """Wait until an expression is true."""
        deadline = time.monotonic() + timeout
        while not self.value(expression):
            assert time.monotonic() < deadline, f"the page does not come to {expression}; it said {self.said}"
            self.listen(0.05)

    def listen(self, seconds):
        """Take what is said within so many seconds."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            assert self._browser.listen(left), "Chromium has ended"

    def _hear(self, message):
        if message.get("sessionId") != self._session:
            return
        method, params = message.get("method"), message.get("params", {})
        if method == "Runtime.consoleAPICalled":
            words = [str(one.get("value", one.get("description", ""))) for one in params["args"]]
            self.said.append(f"{params['type']}: {' '.join(words)}")
        elif method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.said.append(f"exception: {details.get('exception', {}).get('description', details['text'])}")
        elif method == "Log.entryAdded" and params["entry"]["level"] != "verbose":
            entry = params["entry"]
            self.said.append(f"{entry['level']}: {entry['text']} {entry.get('url', '')}".strip())
        elif method == "Network.requestWillBeSent":
            self.asked_for.append(params["request"]["url"])
