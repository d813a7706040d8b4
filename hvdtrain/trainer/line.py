"""A line of metrics: begun after the steps that the settings name, written when what all ranks tell is there."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from hvdtrain.data.stream import ENDLESS
from hvdtrain.trainer.device_clock import finish
from hvdtrain.trainer.due import LogDue
from hvdtrain.trainer.rank_figures import figures_of, metrics_of
from hvdtrain.trainer.skipped import SkippedSteps
from hvdtrain.trainer.values import count_targets
from hvdtrain.trainer.window import MetricWindow

if TYPE_CHECKING:
    from hvdtrain.trainer.job import Job
    from hvdtrain.trainer.saver import Saver
    from hvdtrain.trainer.state import Training
    from hvdtrain.trainer.stopwatch import Stopwatch


class Lines:
    """Writes the lines of a run, each as soon as no step waits for it.

    Where ranks average in every step, that is at once. Where they train apart, what they tell each other may take
    longer than a step, and waits behind whatever travels already: a line is written some steps later, before the next
    one and before anything else that looks at the training.
    """

    def __init__(self, job: Job, training: Training, stopwatch: Stopwatch, saver: Saver) -> None:
        self._job, self._training, self._stopwatch, self._saver = job, training, stopwatch, saver
        self._due = LogDue(job, training.step)
        self._wait: Callable[[], dict[str, float]] | None = None
        self._step = self._ready = 0

    def after_step(self, late: int, is_last: bool) -> None:
        """Begin a line if it is time for one, and write the one that is on its way if it is due. Collective.

        Args:
            late: steps that a message of a few bytes takes, 1 if none waits for it; alike on all ranks.
            is_last: whether the run ends here, where there always is a line.

        Raises:
            DivergedError: as `train_step`.
        """
        training = self._training
        if is_last or self._due.after(training.step):
            self.finish()
            self._wait = start_metrics(self._job, training, self._stopwatch)
            self._step = self._ready = training.step
            if not training.strategy.agrees:
                self._ready = max(training.step + late, training.strategy.busy_until(training))
        if self._wait is not None and training.step >= self._ready:
            self.finish()
        else:
            self._job.log.advance(training.step)

    def finish(self) -> None:
        """Write the line that is on its way, if one is. Collective.

        Raises:
            DivergedError: as `train_step`.
        """
        if self._wait is None:
            return
        wait, self._wait = self._wait, None
        metrics = wait()
        self._job.log.write(self._step, {**metrics, **self._saver.metrics()})
        slowest = max((figures.step_s for figures in self._training.ranks), default=metrics["time/step_s"])
        self._due.note(self._training.step, slowest)


def step_metrics(job: Job, training: Training, stopwatch: Stopwatch) -> dict[str, float]:
    """Return the components' figures of the steps since the last call, and where their time has gone. Collective.

    Raises:
        DivergedError: as `train_step`.
    """
    return start_metrics(job, training, stopwatch)()


def start_metrics(job: Job, training: Training, stopwatch: Stopwatch) -> Callable[[], dict[str, float]]:
    """Begin a line after a step; returns what waits for what all ranks tell, and returns its figures. Collective.

    Raises:
        DivergedError: as `train_step`; also the function that it returns.
    """
    world, step = job.world, training.step
    finish(world.device)  # a line of metrics reads what lies there, and would wait all the same
    skipped, window = training.component(SkippedSteps), training.component(MetricWindow)
    num_skipped = skipped.in_window() if skipped is not None else 0
    lap = stopwatch.lap(step)
    own = job.order.micro_batches(step - 1, world.rank, training.runs_in_step) if step else []
    training.figures = figures_of(lap, sum(map(len, own)), world.device, num_skipped)
    if window is not None:
        window.start_line(training)

    def arrived() -> dict[str, float]:
        epochs = step / job.order.steps_per_epoch
        metrics: dict[str, float] = {"train/epoch": epochs} if job.order.num_samples < ENDLESS else {}
        for component in training.components:
            metrics.update(component.metrics(training))
        num_targets = count_targets(job.task.train_data, job.order.global_batch(step - 1))
        metrics[f"throughput/{job.task.unit}_per_s"] = num_targets / lap.step_s
        metrics["time/step_s"] = lap.step_s
        metrics["time/left_s"] = lap.step_s * (job.num_steps - step)
        return {**metrics, **metrics_of(lap, training.ranks)}

    return arrived
