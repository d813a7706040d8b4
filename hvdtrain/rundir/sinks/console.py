"""The sink of people: standard output of rank 0."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

from tqdm import tqdm

from hvdtrain.rundir.sinks.sink import Metrics
from hvdtrain.settings.units import duration


class Console:
    """Shows metrics to a person: a progress bar on a terminal, elsewhere plain lines at a humane pace."""

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
