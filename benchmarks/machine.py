"""What a result was measured on: written at the head of every file in `benchmarks/results/`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path


def describe() -> str:
    """Return command, date, versions and machine, one a line."""
    import torch

    lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
    told = {name.strip(): value.strip() for name, _, value in reversed(lines)}
    cpu = told.get("model name", platform.machine())
    if "cpu family" in told:  # of one name there are several generations
        cpu += f" (family {told['cpu family']}, model {told['model']})"
    gpu = f", {torch.cuda.get_device_name(0)}" if torch.cuda.is_available() else ""
    try:
        horovod = importlib.metadata.version("horovod")
    except importlib.metadata.PackageNotFoundError:
        horovod = "not installed"
    # Paths would name the machine, and say nothing.
    words = [Path(word).name if word.startswith("/") else word for word in sys.argv]
    return "\n".join(
        (
            f"command:  python benchmarks/{shlex.join([Path(words[0]).name, *words[1:]])}",
            f"date:     {datetime.now(timezone.utc):%Y-%m-%d}",
            f"versions: python {platform.python_version()}, torch {torch.__version__}, horovod {horovod}",
            f"machine:  {cpu}, {len(os.sched_getaffinity(0))} cores, {torch.backends.cpu.get_cpu_capability()}{gpu}",
        )
    )


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Return median, and the quartiles in brackets."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return f"{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def take_turns(actions: Sequence[Callable[[], object]], repeats: int, warm_up: int = 3) -> list[list[float]]:
    """Return the seconds of this thread's processor time that each repetition of each action takes."""
    times: list[list[float]] = [[] for _ in actions]
    for repeat in range(repeats + warm_up):
        for action, measured in zip(actions, times, strict=True):
            started = time.thread_time()
            action()
            taken = time.thread_time() - started
            if repeat >= warm_up:
                measured.append(taken)
    return times
