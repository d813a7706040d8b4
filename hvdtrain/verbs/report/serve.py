"""`report --serve`: the page of runs that still train, on this machine alone."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from hvdtrain.errors import ConfigError, UsageError, counted, reason_of
from hvdtrain.process.stop import StoppedEarly
from hvdtrain.rundir.directory import RunDirectory
from hvdtrain.verbs.kit import write_line
from hvdtrain.verbs.report.page import page_of
from hvdtrain.verbs.report.runs import ReadRun
from hvdtrain.verbs.report.shell import POLICY

LOOPBACK = "127.0.0.1"
_NAMES = (LOOPBACK, "localhost")
SECONDS_BETWEEN_LOOKS = 5.0
# Drawing takes at most about this share of the time of a core.
_SHARE = 0.2


class LivePage:
    """The page of runs, drawn anew once their files have changed.

    Args:
        read: reads the runs; also returns HTML that stands above them.
        paths: their directories, or those of sweeps.
        bokeh: the source of BokehJS.
    """

    def __init__(self, read: Callable[[], tuple[Sequence[ReadRun], str]], paths: Sequence[Path], bokeh: str) -> None:
        self._read, self._paths, self._bokeh = read, paths, bokeh
        self._lock = threading.Lock()
        self._version, self._runs = "", read()
        self._is_drawable_at = 0.0
        self._drawn: dict[bool, tuple[str, str]] = {}

    def whole(self) -> str:
        """Return the page as a browser opens it."""
        return self._page(is_whole=True)[1]

    def since(self, version: str) -> str | None:
        """Return the page without Bokeh, for a browser that has it; None where nothing is new since that version."""
        now, page = self._page(is_whole=False)
        return None if now == version else page

    def _page(self, is_whole: bool) -> tuple[str, str]:
        with self._lock:  # one at a time: several windows need no more drawings than one
            found = _version_of(self._paths)
            if found != self._version and time.monotonic() >= self._is_drawable_at:
                self._version, self._runs, self._drawn = found, self._read(), {}
            if is_whole not in self._drawn:
                started = time.monotonic()
                runs, preface = self._runs
                page = page_of(runs, self._bokeh if is_whole else "", preface)
                self._is_drawable_at = time.monotonic() + (time.monotonic() - started) / _SHARE
                self._drawn[is_whole] = self._version, _made_live(page, self._version)
            return self._drawn[is_whole]


def _version_of(paths: Sequence[Path]) -> str:
    """Return what changes when the files of runs do."""
    digest = hashlib.sha256()
    of_sweeps = (trial for path in paths for trial in sorted(path.glob("trial-*")))
    for run in map(RunDirectory, (*paths, *of_sweeps)):
        for file in (run.metrics, run.rank_log(0), run.config, run.environment, run.path / "checkpoints"):
            with contextlib.suppress(OSError):
                status = file.stat()
                digest.update(repr((str(file), status.st_ino, status.st_size, status.st_mtime_ns)).encode())
    return digest.hexdigest()[:16]


def _made_live(page: str, version: str) -> str:
    """Return a page that asks this server what is new, and nobody else."""
    script = (resources.files("hvdtrain.verbs.report") / "live.js").read_text(encoding="utf-8")
    page = page.replace(POLICY, f"{POLICY}; connect-src 'self'", 1)
    before, end, after = page.rpartition("</body>")
    told = f"data-version='{version}' data-seconds='{SECONDS_BETWEEN_LOOKS:g}'"
    return f"{before}<script {told}>{script}</script>{end}{after}"


class _Handler(BaseHTTPRequestHandler):
    server: LiveServer

    def do_GET(self) -> None:
        """Answer with the page, or with what is new of it."""
        # A page of another site whose name was made to lead here must not read what runs are called.
        # The port may be any: that of a tunnel's other end.
        if self.headers.get("Host", "").partition(":")[0] not in _NAMES:
            return self._answer(HTTPStatus.FORBIDDEN, "this server answers to its own address alone")
        address = urlsplit(self.path)
        try:
            if address.path == "/":
                self._answer(HTTPStatus.OK, self.server.page.whole())
            elif address.path == "/now":
                new = self.server.page.since(parse_qs(address.query).get("seen", [""])[0])
                self._answer(HTTPStatus.NO_CONTENT if new is None else HTTPStatus.OK, new or "")
            else:
                self._answer(HTTPStatus.NOT_FOUND, "there is nothing here but /")
        except UsageError as error:  # a directory is gone, or a sweep damaged
            self._answer(HTTPStatus.SERVICE_UNAVAILABLE, str(error))

    def _answer(self, status: HTTPStatus, text: str) -> None:
        content = text.encode("utf-8", "replace")
        self.send_response(status)
        kind = "text/html" if status == HTTPStatus.OK else "text/plain"
        headers = {"Content-Type": f"{kind}; charset=utf-8", "Cache-Control": "no-store"}
        headers |= {"X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY"}
        headers |= {"Content-Length": str(len(content))} if status != HTTPStatus.NO_CONTENT else {}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing: a line each five seconds helps nobody."""


class LiveServer(ThreadingHTTPServer):
    """Serves a live page on loopback.

    Args:
        page: what is served.
        port: 0 for one that is free.

    Raises:
        ConfigError: the port cannot be had.
    """

    daemon_threads = True

    def __init__(self, page: LivePage, port: int) -> None:
        self.page = page
        try:
            super().__init__((LOOPBACK, port), _Handler)
        except OSError as error:
            raise ConfigError(
                f"--serve {port}: that port of {LOOPBACK} cannot be had ({reason_of(error)}): name another, or leave it"
                " out for one that is free"
            ) from error

    @property
    def address(self) -> str:
        """Return where a browser of this machine finds it."""
        return f"http://{LOOPBACK}:{self.server_port}/"

    def handle_error(self, request: object, client_address: object) -> None:
        """Tell of an error in one line, but of a browser that has gone away nothing."""
        error = sys.exc_info()[1]
        if not isinstance(error, ConnectionError):
            write_line(f"hvdtrain: a request was not answered: {type(error).__name__}: {error}", sys.stderr)


def serve(page: LivePage, port: int, num_runs: int) -> int:
    """Serve a page until Ctrl-C; returns the exit code.

    Raises:
        ConfigError: the port cannot be had.
    """
    with LiveServer(page, port) as server:
        for line in _greeting(server, num_runs):
            write_line(line, sys.stdout)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            pass  # that is how it ends
        except StoppedEarly as stop:
            if stop.name != "SIGINT":
                raise
    return 0


def _greeting(server: LiveServer, num_runs: int) -> Iterator[str]:
    yield f"{server.address} follows {counted(num_runs, 'run')}: new every {SECONDS_BETWEEN_LOOKS:g} s, until Ctrl-C"
    if "SSH_CONNECTION" in os.environ:
        port = server.server_port
        yield f"from where you sit: ssh -L {port}:{LOOPBACK}:{port} {socket.gethostname()}, and that address there"
