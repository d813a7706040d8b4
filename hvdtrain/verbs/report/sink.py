"""The report that a run writes of itself, while it trains and when it has finished."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable

from hvdtrain.rundir.directory import RunDirectory
from hvdtrain.rundir.sinks.sink import Metrics

# The first report is taken to cost so much, with the import of Bokeh; of later ones it is known.
FIRST_COST_S = 3.0
SHARE, SHARE_AT_END = 0.01, 0.05
"""Of the time of a run, that its reports take at most while it trains; and that of its end."""
# Other ranks wait meanwhile. Of metrics beyond this, reading alone would take longer.
_LONGEST_S, _MOST_BYTES = 10.0, 1 << 27
# In a line that follows a save.
_SAVED = "time/checkpoint_stall_s"


def can_report() -> bool:
    """Return whether what draws is installed; it is not imported."""
    return importlib.util.find_spec("bokeh") is not None


class ReportSink:
    """Writes `RUN_DIR/report.html` after evaluations, when the clock of training rests, and when a run has finished.

    Where a run has no evaluations, after saves. These take 1 % of the run's time at most, the one at its end 5 %: a run
    of a minute has one. A stop on request writes none: whoever asked may not wait. What goes wrong is said, once, and
    costs the run nothing.

    Args:
        run: its directory.
        say: takes what a person should know.
        clock: seconds, ascending.
    """

    def __init__(
        self, run: RunDirectory, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._run, self._say, self._clock = run, say, clock
        self._began = self._since = clock()
        self._cost_s = FIRST_COST_S
        self._has_finished = self._has_failed = self._has_evaluated = False

    def begin(self, step: int, num_steps: int) -> None:
        """Note when training begins."""
        self._began = self._since = self._clock()

    def write(self, step: int, metrics: Metrics, event: str | None) -> None:
        """Write the report at an evaluation, or behind a save, where enough time has passed since the last one."""
        self._has_finished = event == "finished"
        is_evaluation = any(name.startswith("val/") for name in metrics)
        self._has_evaluated = self._has_evaluated or is_evaluation
        if not event and (is_evaluation or (_SAVED in metrics and not self._has_evaluated)):
            self._write_within(SHARE * (self._clock() - self._since))

    def close(self) -> None:
        """Write the report of a run that has finished, with its last words."""
        if self._has_finished:
            self._has_finished = False
            self._write_within(SHARE_AT_END * (self._clock() - self._began))

    def _write_within(self, seconds: float) -> None:
        """Write the report if it will take so long at most."""
        if self._has_failed or self._cost_s > min(_LONGEST_S, seconds):
            return
        started = self._clock()
        try:
            if self._run.metrics.stat().st_size > _MOST_BYTES:
                return
            _write(self._run)
        except Exception as error:  # of any type, from a library of others: no report is worth a run
            self._has_failed = True
            self._say(f"warning: {self._run.report} cannot be written ({error!r}); training goes on without it")
        self._since = self._clock()
        self._cost_s = self._since - started


def _write(run: RunDirectory) -> None:
    """Write the report of a run. What that takes is imported now: a short run has none."""
    from hvdtrain.verbs.report.command import write_page
    from hvdtrain.verbs.report.page import page_of
    from hvdtrain.verbs.report.runs import read_run
    from hvdtrain.verbs.report.shell import bokeh_source

    write_page(run.report, page_of([read_run(run.path)], bokeh_source()))
