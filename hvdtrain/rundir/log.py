"""Metrics: the stopwatch, and the sinks they go to. Knows no ranks: rank 0 has sinks, the others have none.

Names are `group/name` and carry their unit: `train/loss`, `time/step_s`, `throughput/tokens_per_s`.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TextIO

from tqdm import tqdm

from hvdtrain.errors import ConfigError
from hvdtrain.settings.units import duration

Metrics = Mapping[str, float]
logger = logging.getLogger("hvdtrain")


class Stopwatch:
    """Measures the seconds spent in training, without evaluation and saving; runs from the start."""

    def __init__(self, step: int = 0) -> None:
        self._started = time.perf_counter()
        self._seconds = 0.0
        self._running = True
        self._lap_step, self._lap_seconds = step, 0.0

    @property
    def seconds(self) -> float:
        """Return the seconds measured so far."""
        return self._seconds + (time.perf_counter() - self._started if self._running else 0.0)

    def lap(self, step: int) -> float:
        """Return the mean seconds a step since the last lap, up to `step` completed ones."""
        seconds = self.seconds
        mean = (seconds - self._lap_seconds) / max(1, step - self._lap_step)
        self._lap_step, self._lap_seconds = step, seconds
        return mean

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count what happens inside."""
        self._seconds, self._running = self.seconds, False
        try:
            yield
        finally:
            self._started, self._running = time.perf_counter(), True


class Sink(Protocol):
    """A place that metrics go to."""

    def begin(self, step: int, num_steps: int) -> None:
        """Get ready for the steps after `step`, up to `num_steps`. Called once, when nothing is refused any more."""
        ...

    def write(self, step: int, metrics: Metrics, event: str | None) -> None:
        """Take the metrics of a step (in optimizer steps completed) and perhaps what happened then."""
        ...

    def close(self) -> None:
        """Finish."""
        ...


class JsonLines:
    """Writes `RUN_DIR/metrics.jsonl`: one JSON object a line.

    On resume, lines of steps that the checkpoint does not have are dropped: the run goes through them again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: TextIO | None = None

    def begin(self, step: int, num_steps: int) -> None:
        """Open the file, less the lines after `step`; a run that goes on has not finished."""
        lines = [line for line in _read_lines(self._path) if line["step"] <= step]
        if step < num_steps:
            for line in lines:
                line.pop("event", None)
        temporary = self._path.with_suffix(".writing")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
        temporary.replace(self._path)
        self._file = self._path.open("a")

    def write(self, step: int, metrics: Metrics, event: str | None) -> None:
        """Append a line and hand it to the operating system."""
        assert self._file is not None, "begin() comes first"
        # JSON knows no NaN and no infinity.
        known = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        line: dict[str, Any] = {"step": step, **known}
        if event:
            line["event"] = event
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file:
            self._file.close()


class TensorBoard:
    """Writes TensorBoard event files."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError("--log.tensorboard needs TensorBoard: pip install tensorboard") from error
        self._folder = str(folder)
        self._open = SummaryWriter
        self._writer: Any = None

    def begin(self, step: int, num_steps: int) -> None:
        """Open the files; on resume, what they hold of later steps is hidden."""
        self._writer = self._open(self._folder, purge_step=step + 1 if step else None)

    def write(self, step: int, metrics: Metrics, event: str | None) -> None:
        """Write each metric as a scalar."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close."""
        if self._writer:
            self._writer.close()


class Console:
    """What rank 0 tells a person: a progress bar on a terminal, elsewhere plain lines at a humane pace."""

    seconds_between_lines = 5.0

    def __init__(self, is_terminal: bool, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._is_terminal = is_terminal
        self._bar: tqdm[Any] | None = None
        self._num_steps = 0
        self._last_line = float("-inf")

    def begin(self, step: int, num_steps: int) -> None:
        """Start showing progress from `step` to `num_steps`."""
        self._num_steps = num_steps
        if self._is_terminal:
            self._bar = tqdm(
                initial=step, total=num_steps, unit="step", dynamic_ncols=True, leave=False, file=self._stream
            )

    def say(self, text: str) -> None:
        """Print a line, in one write: several ranks may share the terminal."""
        if self._bar is not None:
            self._bar.clear()
        self._stream.write(text + "\n")
        self._stream.flush()

    def write(self, step: int, metrics: Metrics, event: str | None) -> None:
        """Show the metrics of a step; training lines that come too fast are left out, evaluation never is."""
        is_evaluation = any(name.startswith("val/") for name in metrics)
        text = describe(metrics)
        if event:
            self.close()
        if self._bar is not None and not is_evaluation:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.n = step
            self._bar.refresh()
            return
        now = time.monotonic()
        if is_evaluation or event or now - self._last_line >= self.seconds_between_lines or step == self._num_steps:
            if not is_evaluation:
                self._last_line = now
            self.say(f"step {step:>{len(str(self._num_steps))}}/{self._num_steps}  {text}")

    def close(self) -> None:
        """Remove the progress bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class MetricLog:
    """All sinks of a run. A rank without sinks writes nothing."""

    def __init__(self, console: Console | None, sinks: list[Sink]) -> None:
        self._console = console
        self._sinks = sinks + ([console] if console else [])

    def begin(self, step: int, num_steps: int) -> None:
        """Get every sink ready for the steps after `step`."""
        for sink in self._sinks:
            sink.begin(step, num_steps)

    def say(self, text: str) -> None:
        """Tell a person, and this rank's log file."""
        logger.info(text)
        if self._console:
            self._console.say(text)

    def write(self, step: int, metrics: Metrics, event: str | None = None) -> None:
        """Hand the metrics of a step to every sink."""
        for sink in self._sinks:
            sink.write(step, metrics, event)

    def close(self) -> None:
        """Close every sink."""
        for sink in self._sinks:
            sink.close()


def open_rank_log(path: Path) -> logging.Handler:
    """Send this rank's log messages to its own file; returns the handler, to be removed with `close_rank_log`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    return handler


def close_rank_log(handler: logging.Handler) -> None:
    """Undo `open_rank_log`."""
    logger.removeHandler(handler)
    handler.close()


def describe(metrics: Metrics) -> str:
    """Return metrics as a person reads them: `loss 2.104  lr 1.00e-03  12,345 tokens/s  3m20s left`."""
    parts = []
    for name, value in metrics.items():
        group, _, short = name.partition("/")
        if group == "throughput":
            parts.append(f"{value:,.0f} {short.removesuffix('_per_s')}/s")
        elif name == "train/lr":
            parts.append(f"lr {value:.2e}")
        elif name == "time/left_s":
            parts.append(f"{duration(value)} left")
        elif group in ("train", "val"):
            label = short.replace("_", " ")
            parts.append(f"{'held-out ' if group == 'val' else ''}{label} {value:.4g}")
    return "  ".join(parts)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the file's complete lines; a last one cut short by a crash is dropped."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
