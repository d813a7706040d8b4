"""`--health.spikes`: gradients and losses far above what is usual: said, left out, or the end of the run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hvdtrain.errors import DivergedError, on_all_ranks
from hvdtrain.trainer.component import Component, Step
from hvdtrain.trainer.running_scale import RunningScale
from hvdtrain.trainer.window import MetricWindow

if TYPE_CHECKING:
    from hvdtrain.trainer.job import Job
    from hvdtrain.trainer.state import Training

# Logarithms are judged: a norm or a loss falls by factors, and spreads by factors. A spike is so many robust standard
# deviations above the median, and at least so many times it. tests/unit/test_spikes.py tries them on healthy runs; of
# real ones, small decoders had norms of 5.2 and 6.6 times the median in 20 runs (benchmarks/planted_faults.py).
DEVIATIONS = 7.0
NORM_FACTOR, LOSS_FACTOR = 8.0, 1.2
# Steps that are remembered, those before the first verdict, and those between two computations of the limit.
NORMS, LEAST_NORMS, EVERY = 128, 32, 16
# The same of lines of metrics.
LOSSES, LEAST_LOSSES = 64, 16
# So many in a row are no spikes: another level, or divergence.
IN_A_ROW = 5


class Spikes(Component):
    """Holds each step's gradient norm against those before, and each line's mean loss.

    What it decides by is alike on all ranks: the norm of the averaged gradient, the mean over all ranks. The norm of a
    step is heard of during the next one, so that nothing waits for a GPU, and is judged there by what came before it.
    """

    name = "spikes"

    def __init__(self, job: Job) -> None:
        self._job, self._does = job, job.config.health.spikes
        # Ranks that train apart have norms of their own; what they share is the loss.
        self._sees_norms = job.strategy.agrees
        self._norms = RunningScale(NORMS, LEAST_NORMS, DEVIATIONS, EVERY)
        self._losses = RunningScale(LOSSES, LEAST_LOSSES, DEVIATIONS)
        self._in_a_row = {"norm": 0, "loss": 0}
        self._in_window = 0
        self._pending: Step | None = None

    @classmethod
    def of(cls, job: Job) -> Spikes | None:
        """Return one unless nobody wants to know."""
        return None if job.config.health.spikes == "off" else cls(job)

    def after_backward(self, training: Training, step: Step) -> None:
        """Judge the step before, and say how long the gradient of this one may be.

        Raises:
            DivergedError: there was a spike, and the run is to end there.
        """
        self._settle()
        if self._sees_norms and self._does in ("skip", "stop"):
            step.norm_limit = self._limit()

    def after_update(self, training: Training, step: Step) -> None:
        """Note whose norm is on its way."""
        self._pending = step if self._sees_norms else None

    def metrics(self, training: Training) -> dict[str, float]:
        """Judge the mean loss of this line, and return how many spikes there were since the last, if any.

        Raises:
            DivergedError: as `after_backward`.
        """
        self._settle()
        window = training.component(MetricWindow)
        if window is not None and 0 < window.loss < math.inf:
            self._judge_loss(window.loss, training.step)
        spikes, self._in_window = self._in_window, 0
        return {"train/spikes": spikes} if spikes else {}

    def state_dict(self) -> dict[str, Any]:
        """Return what is usual, with the last step judged.

        Raises:
            DivergedError: as `after_backward`.
        """
        self._settle()
        return {
            "norms": self._norms.state(),
            "losses": self._losses.state(),
            "in_a_row": dict(self._in_a_row),
            "in_window": self._in_window,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what was usual."""
        self._norms.load(**state["norms"])
        self._losses.load(**state["losses"])
        self._in_a_row, self._in_window = dict(state["in_a_row"]), state["in_window"]

    def _limit(self) -> float:
        """Return the longest gradient that is usual."""
        limit = self._norms.limit(math.log(NORM_FACTOR))
        return math.exp(limit) if limit < _LARGEST else math.inf

    def _settle(self) -> None:
        step, self._pending = self._pending, None
        if step is None or step.outcome is None:
            return
        is_counted, norm = step.outcome.read()
        if not 0 < norm < math.inf:  # what is not finite is another component's
            return
        if not is_counted or norm > self._limit():
            usual = math.exp(self._norms.median)
            self._tell(
                "norm",
                f"step {step.number}: a spike: the gradient norm is {norm:.4g}, {norm / usual:.3g} times the usual"
                f" {usual:.4g} (median of the last steps; up to {self._limit():.4g} is usual)",
                f"step {step.number}: the gradient norm has been above its limit for {IN_A_ROW} steps in a row",
                self._norms,
                acts=True,
            )
        else:
            self._in_a_row["norm"] = 0
        self._norms.add(math.log(norm))

    def _judge_loss(self, loss: float, step: int) -> None:
        limit = self._losses.limit(math.log(LOSS_FACTOR))
        if math.log(loss) > limit:
            usual = math.exp(self._losses.median)
            self._tell(
                "loss",
                f"step {step}: a spike: the mean loss since the last line is {loss:.4g}, the usual one is {usual:.4g}"
                f" (median of the last lines; up to {math.exp(limit):.4g} is usual)",
                f"step {step}: the loss has been above its limit for {IN_A_ROW} lines in a row",
                self._losses,
                acts=False,
            )
        else:
            self._in_a_row["loss"] = 0
        self._losses.add(math.log(loss))

    def _tell(self, what: str, spike: str, stays: str, scale: RunningScale, *, acts: bool) -> None:
        """Say the first spike of several in a row, and that it is none where they stay; end the run if it is to.

        Args:
            what: of which figure.
            spike: what is said of the first.
            stays: what is said where they are too many in a row.
            scale: what was usual.
            acts: whether steps are left out for it.
        """
        self._in_window += 1
        self._in_a_row[what] += 1
        is_left_out = acts and self._does in ("skip", "stop")
        if self._does == "stop":
            raise on_all_ranks(
                DivergedError(f"--health.spikes stop ends the run: {spike}. {self._way_out(is_left_out)}")
            )
        if self._in_a_row[what] == IN_A_ROW:
            self._job.log.say(
                f"WARNING: {stays}: training may diverge, and what is usual is learned anew from here. Try a lower"
                " --optim.peak-lr or a longer --optim.warmup-steps, and look at the data of these steps"
            )
            scale.forget()
            self._in_a_row[what] = 0
        elif is_left_out or self._in_a_row[what] == 1:
            self._job.log.say(f"WARNING: {spike}{'; the step is skipped on all ranks' if is_left_out else ''}")

    def _way_out(self, is_left_out: bool) -> str:
        job = self._job
        checkpoints = job.run.checkpoints.report() if job.directory else "Nothing was saved"
        left_out = "The weights were left as they were before it. " if is_left_out else ""
        return (
            f"{left_out}{checkpoints}. The same command goes on from there with --health.spikes skip or warn; or try a"
            " lower --optim.peak-lr, and look at the data of these steps"
        )


# Of a larger logarithm there is no power.
_LARGEST = 700.0
