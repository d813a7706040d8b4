"""What a run's files tell while it trains: figures, events, and what its ranks had to say."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import socket
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hvdtrain.errors import ConfigError
from hvdtrain.process.run_files import BEST, CHECKPOINTS, LATEST, named_checkpoint, runs_in
from hvdtrain.rundir.directory import RunDirectory
from hvdtrain.rundir.metrics import parse_line
from hvdtrain.verbs.report.rank_log import Record, records_of
from hvdtrain.verbs.watch.tail import Tail

CURVES = ("train/loss", "val/loss")
_MOST_METRICS_BYTES, _MOST_LOG_BYTES, _MOST_SMALL_BYTES = 1 << 28, 1 << 18, 1 << 20
_MOST_LINES, _MOST_EVENTS, _MOST_RANKS = 400, 200, 1024
_MOST_STEPS = 1 << 53
_HOLDER = re.compile(r"process (\d{1,12}) on (\S+)")
_OF_ALL = ("continues at", "stopped at", "finished in", "ended at")
# So many steps' time, and at least so long, without a line: something may be wrong.
_QUIET_STEPS, _QUIET_S = 100.0, 60.0


@dataclass(frozen=True)
class Happened:
    """Something that a person should see."""

    text: str
    is_warning: bool = False


@dataclass
class RankLog:
    """The end of a rank's log."""

    rank: int
    tail: Tail
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=_MOST_LINES))
    told: set[tuple[str, str]] = field(default_factory=set)
    """Time and text of what of it is among the events."""
    trouble: str = ""
    """The last warning since the run was started."""


class Follower:
    """Follows the files of a run; none is locked, and what is broken or half written is left out.

    Args:
        path: directory of the run.

    Raises:
        ConfigError: it holds no run.
    """

    def __init__(self, path: Path) -> None:
        self.run = RunDirectory(path)
        run = self.run
        signs = (run.metrics, run.config, run.environment, run.lock, run.logs, path / CHECKPOINTS)
        # A sweep's own directory is locked as well, and what it has besides is its trials'.
        hint = "" if run.config.exists() else runs_in(path)
        if hint or not any(sign.exists() for sign in signs):
            raise ConfigError(f"{path} holds no run: there are neither metrics.jsonl nor logs in it{hint}")
        self._metrics = Tail(run.metrics, _MOST_METRICS_BYTES)
        self._logs: dict[str, RankLog] = {}
        self.curves: dict[str, tuple[list[int], list[float]]] = {}
        self.last: dict[str, float] = {}
        """The last value of each metric; NaN where it was not finite."""
        self.step = 0
        self.num_bad = 0
        """Lines of metrics that are damaged."""
        self.is_finished = False
        self.new_lines: list[tuple[int, dict[str, float]]] = []
        """Steps and metrics since the last look."""
        self.events: deque[Happened] = deque(maxlen=_MOST_EVENTS)
        self.num_events = 0
        """Ever."""
        self.title = ""
        self._saved: dict[str, str] = {}
        self._changed_at: float | None = None

    def look(self) -> None:
        """Read what is new."""
        self._read_metrics()
        self._read_logs()
        self._read_saves()

    @property
    def num_steps(self) -> int | None:
        """Return the steps of the whole run, as the last line of metrics or the settings tell; None where none does."""
        left, step_s = self.last.get("time/left_s", math.nan), self.last.get("time/step_s", math.nan)
        if step_s > 0 and math.isfinite(left):
            return max(self.step, self._trained + round(left / step_s))
        told = self.run.read_settings().get("train.steps")
        return told if isinstance(told, int) and told > 0 else None

    @property
    def _trained(self) -> int:
        steps, _ = self.curves.get(CURVES[0], ([self.step], []))
        return steps[-1] if steps else self.step

    @property
    def quiet_s(self) -> float | None:
        """Return for how long no line of metrics has come; None where there is none."""
        return None if self._changed_at is None else max(0.0, time.monotonic() - self._changed_at)

    @property
    def is_quiet(self) -> bool:
        """Return whether that is long, for a run as fast as this one."""
        step_s = self.last.get("time/step_s", 0.0)
        return (self.quiet_s or 0.0) > max(_QUIET_S, _QUIET_STEPS * step_s if math.isfinite(step_s) else 0.0)

    def holder(self) -> tuple[str, bool]:
        """Return who trains here, or did last, and whether that process is known to be gone."""
        try:
            with self.run.lock.open(encoding="utf-8", errors="replace") as file:
                found = _HOLDER.match(file.read(200))
        except OSError:
            return "", False
        if not found:
            return "", False
        is_gone = False
        if found[2] == socket.gethostname():
            try:
                os.kill(int(found[1]), 0)
            except ProcessLookupError:
                is_gone = True
            except (OSError, OverflowError):
                pass
        return f"process {found[1]} on {found[2]}", is_gone

    def hosts(self) -> list[str]:
        """Return the host of each rank of the last start; empty where it is not known."""
        with contextlib.suppress(OSError, ValueError, RecursionError, AttributeError, TypeError):
            with self.run.environment.open("rb") as file:
                ranks = json.loads(file.read(_MOST_SMALL_BYTES)).get("ranks")
            return [str(rank.get("host")) for rank in ranks]
        return []

    @property
    def ranks(self) -> list[RankLog]:
        """Return what the ranks have logged, by rank."""
        return sorted(self._logs.values(), key=lambda log: log.rank)

    @property
    def troubles(self) -> list[str]:
        """Return what could not be read, in words."""
        tails = [self._metrics, *(log.tail for log in self.ranks)]
        found = [f"{tail.path.name} cannot be read ({tail.trouble})" for tail in tails if tail.trouble]
        if not self.run.path.is_dir():
            found.append(f"{self.run.path} is not there any more")
        if self.num_bad:
            found.append(f"{self.num_bad:,} damaged line{'s' * (self.num_bad != 1)} of metrics left out")
        return found

    def _tell(self, text: str, is_warning: bool = False) -> None:
        self.events.append(Happened(" ".join(text.split()), is_warning))
        self.num_events += 1

    def _read_metrics(self) -> None:
        lines, is_anew = self._metrics.read()
        self.new_lines = []
        if is_anew:  # a run that goes on from a checkpoint drops the lines behind it
            self.curves, self.last, self.step, self.num_bad = {}, {}, 0, 0
        for line in lines:
            values = parse_line(line) if line.strip() else {}
            if values is None or (values and not 0 <= values["step"] < _MOST_STEPS):
                self.num_bad += 1
            elif values:
                self._add(values)
        if self.new_lines:
            self._note_change(is_first=self._changed_at is None)

    def _note_change(self, is_first: bool) -> None:
        age = 0.0
        with contextlib.suppress(OSError):
            age = time.time() - self.run.metrics.stat().st_mtime if is_first else 0.0
        self._changed_at = time.monotonic() - max(0.0, age)

    def _add(self, values: Mapping[str, Any]) -> None:
        step = self.step = values["step"]
        numbers = {name: _number(value) for name, value in values.items() if name not in ("step", "event")}
        known = {name: value for name, value in numbers.items() if value is not None}
        self.new_lines.append((step, known))
        self.last.update(known)
        self.is_finished = values.get("event") == "finished"
        for name in CURVES:
            if name in known:
                steps, heights = self.curves.setdefault(name, ([], []))
                steps.append(step)
                heights.append(known[name])
        for name, what in (("train/skipped_steps", "skipped steps"), ("checkpoint/failed", "saves that failed")):
            if known.get(name, 0) > 0:
                self._tell(f"step {step:,}: {known[name]:g} {what}", is_warning=True)

    def _read_logs(self) -> None:
        with contextlib.suppress(OSError):
            for path in sorted(self.run.logs.glob("rank-*.log"))[:_MOST_RANKS]:
                number = path.stem.removeprefix("rank-")
                if path.name not in self._logs and number.isascii() and number.isdecimal():
                    self._logs[path.name] = RankLog(int(number), Tail(path, _MOST_LOG_BYTES))
        for log in self.ranks:
            lines, is_anew = log.tail.read()
            if is_anew:
                log.lines.clear()
            if lines:
                log.lines.extend(line.decode(errors="replace") for line in lines)
                self._read_records(log, [*records_of([*log.lines])])

    def _read_records(self, log: RankLog, records: list[Record]) -> None:
        starts = [i for i, record in enumerate(records) if record.text.startswith("hvdtrain ")]
        if starts:
            records = records[starts[-1] :]
            if log.rank == 0:
                self.title = records[0].text.splitlines()[0]
        warned = [said for record in records for said in _said(record) if said.is_warning]
        log.trouble = warned[-1].text if warned else ""
        # Not by record: one may grow, since why a run has ended stands behind whatever was logged last.
        said_at = {(record.time, said.text): said for record in records for said in _said(record)}
        for (when, text), said in said_at.items():
            if (when, text) not in log.told and (log.rank == 0 or said.is_warning):
                self._tell(f"{when[-8:]} {f'rank {log.rank}: ' if log.rank else ''}{text}", said.is_warning)
        log.told = {*said_at}

    def _read_saves(self) -> None:
        for pointer, what in ((LATEST, "saved"), (BEST, "best so far")):
            name = named_checkpoint(self.run.path, pointer)
            if name and self._saved.get(pointer) != name:
                self._saved[pointer] = name
                step = name.removeprefix("step-").lstrip("0") or "0"
                if step.isascii() and step.isdecimal():
                    self._tell(f"step {int(step[:18]):,}: {what}")


def _said(record: Record) -> Iterable[Happened]:
    """Yield what of a record is an event: a warning, a restart, an end, and why the ranks have left."""
    first, *more = record.text.splitlines() or [""]
    if record.is_warning or first.startswith(_OF_ALL):
        yield Happened(first, record.is_warning)
    for line in more:
        if line.startswith("hvdtrain: "):
            yield Happened(line.removeprefix("hvdtrain: "), is_warning=True)


def _number(value: Any) -> float | None:
    """Return a metric's value, NaN where it was not finite; None for what is no number."""
    if value is None:
        return math.nan
    if type(value) not in (int, float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return math.nan
    return number if math.isfinite(number) else math.nan
