"""The verb `watch`."""

from __future__ import annotations

import os
import sys
import time

from hvdtrain.process.stop import StoppedEarly
from hvdtrain.rundir.sinks import describe
from hvdtrain.verbs.kit import write_line
from hvdtrain.verbs.options import WatchOptions
from hvdtrain.verbs.watch.follow import Follower
from hvdtrain.verbs.watch.view import printable, state_of, view

# Where output is no terminal: lines that are there at first, and seconds between two of training.
_FIRST_LINES, _SECONDS_BETWEEN_LINES = 10, 5.0


def watch(options: WatchOptions) -> int:
    """Answer `watch RUN_DIR`: until the run has finished, or until Ctrl-C; returns the exit code.

    Raises:
        ConfigError: the directory holds no run.
    """
    run = Follower(options.run_dir)
    try:
        if sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
            _draw(run, options.every)
        else:
            _print(run, options.every)
    except KeyboardInterrupt:
        pass  # that is how it ends
    except StoppedEarly as stop:
        if stop.name != "SIGINT":
            raise
    except BrokenPipeError:  # `| head` has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _draw(run: Follower, every: float) -> None:
    from rich.console import Console
    from rich.live import Live

    console = Console(highlight=False)
    is_ascii = not (console.encoding or "").lower().startswith("utf")
    # No thread draws by itself: a signal must find this one, and what is drawn must be whole.
    with Live(console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False) as live:
        while True:
            run.look()
            live.update(view(run, console.width, console.height, is_ascii), refresh=True)
            if run.is_finished:
                return
            time.sleep(every)


def _print(run: Follower, every: float) -> None:
    """Print what comes, a line each: events and evaluations all, lines of training at a humane pace."""
    printed_at, shown_state, num_events = float("-inf"), "", 0
    troubles: list[str] = []
    is_first = True
    while True:
        run.look()
        if is_first:
            _write(f"{run.run} {run.title}".rstrip())
        new = run.num_events - num_events
        for event in [*run.events][-new:] if new else ():
            _write(event.text)
        num_events = run.num_events
        printed_at = _print_lines(run, is_first, printed_at)
        for trouble in run.troubles:
            if trouble not in troubles:
                _write(trouble)
        troubles = run.troubles
        state, is_trouble = state_of(run)
        kind = state.partition(":")[0].partition(" for ")[0]
        if (is_trouble or run.is_finished or run.quiet_s is None) and kind != shown_state:
            _write(state)
        shown_state, is_first = kind, False
        if run.is_finished:
            return
        time.sleep(every)


def _print_lines(run: Follower, is_first: bool, printed_at: float) -> float:
    """Print new lines of metrics; takes and returns when one of training was printed last."""
    for step, metrics in run.new_lines[-_FIRST_LINES:] if is_first else run.new_lines:
        if not describe(metrics):  # of other things than a person follows
            continue
        is_evaluation = any(name.startswith("val/") for name in metrics)
        now = time.monotonic()
        if is_first or is_evaluation or now - printed_at >= _SECONDS_BETWEEN_LINES:
            printed_at = printed_at if is_evaluation else now
            of = f"/{run.num_steps}" if run.num_steps else ""
            _write(f"step {step}{of}  {describe(metrics)}")
    return printed_at


def _write(text: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"
    write_line(printable(text).encode(encoding, "replace").decode(encoding), sys.stdout)
