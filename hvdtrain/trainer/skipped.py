"""Steps that were skipped: counted; where loss or gradient was not finite also said, and too many end the run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from hvdtrain.errors import DivergedError
from hvdtrain.trainer.component import Component, Step
from hvdtrain.trainer.job import Job

if TYPE_CHECKING:
    from hvdtrain.trainer.state import Training


class SkippedSteps(Component):
    """Learns of each step whether it counts while the next one is computed, so that none waits for the device."""

    name = "skipped_steps"

    def __init__(self, job: Job) -> None:
        self._job = job
        self.is_replicated = job.strategy.agrees
        self._in_window = 0
        self._in_a_row = 0
        self._pending: Step | None = None
        self._training: Training | None = None

    @property
    def in_a_row(self) -> int:
        """Return how many steps up to the last one that is counted were skipped."""
        return self._in_a_row

    def after_backward(self, training: Training, step: Step) -> None:
        """Count the step before.

        Raises:
            DivergedError: as many steps in a row as `--health.max-skipped-steps` were skipped.
        """
        self._training = training
        self._settle()

    def after_update(self, training: Training, step: Step) -> None:
        """Note whose outcome is on its way."""
        self._pending = step

    def in_window(self) -> int:
        """Return how many steps were skipped since the last line, up to the last step.

        Raises:
            DivergedError: as `after_backward`.
        """
        self._settle()
        return self._in_window

    def metrics(self, training: Training) -> dict[str, float]:
        """Return how many steps were skipped, if any.

        Raises:
            DivergedError: as `after_backward`.
        """
        if self.is_replicated:
            self._settle()
            skipped, self._in_window = self._in_window, 0
        else:  # as many as have been told: there may be more by now
            told = [int(figures.skipped) for figures in training.ranks]
            skipped = sum(told)
            self._in_window -= told[self._job.world.rank]
            if skipped:
                self._job.log.say(f"WARNING: {skipped} steps of single ranks were skipped up to here, not being finite")
        return {"train/skipped_steps": skipped} if skipped else {}

    def state_dict(self) -> dict[str, Any]:
        """Return both counts, with the last step counted.

        Raises:
            DivergedError: as `after_backward`.
        """
        self._settle()
        return {"in_window": self._in_window, "in_a_row": self._in_a_row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Count on."""
        self._in_window, self._in_a_row = state["in_window"], state["in_a_row"]

    def redistribute(self, states: Sequence[Mapping[str, Any]], rank: int) -> Mapping[str, Any] | None:
        """Give what was skipped to rank 0; in a row, all have as many as the worst."""
        skipped = sum(state["in_window"] for state in states) if rank == 0 else 0
        return {"in_window": skipped, "in_a_row": max(state["in_a_row"] for state in states)}

    def _settle(self) -> None:
        step, self._pending = self._pending, None
        if step is None or step.outcome is None:
            return
        is_counted, norm = step.outcome.read()
        if not is_counted and not math.isfinite(norm):
            self._skip(step)
        else:
            self._in_window += not is_counted  # the gradient was too long: whoever set the limit says so
            self._in_a_row = 0

    def _skip(self, step: Step) -> None:
        """Count a skipped step and say whose loss it was."""
        job = self._job
        self._in_window += 1
        self._in_a_row += 1
        loss = float(step.totals[job.task.metrics.index("loss")])
        losses = {job.world.rank: loss}
        if self.is_replicated:
            losses = dict(enumerate(job.world.all_gather_object(loss, "skip")))
        ranks = [str(rank) for rank, loss in losses.items() if not torch.tensor(loss).isfinite()]
        who = f"the loss on rank {', '.join(ranks)}" if ranks else "the gradient"
        where = "all ranks" if self.is_replicated else f"rank {job.world.rank} alone"
        assert self._training is not None
        notes = "".join(component.note_on_skip() for component in self._training.components)
        job.log.say(f"WARNING: step {step.number} is skipped on {where}: {who} is not finite{notes}")
        if self._in_a_row >= job.config.health.max_skipped_steps:
            checkpoints = job.run.checkpoints.report() if job.directory else "Nothing was saved"
            error = DivergedError(
                f"{self._in_a_row} steps in a row were skipped, up to step {step.number}: {who} is not finite."
                f" {checkpoints}. Try a lower --optim.peak-lr, a longer"
                " --optim.warmup-steps or --train.precision fp32, and look at the data of these steps"
            )
            error.is_on_all_ranks = self.is_replicated  # others train on, and would not be there to part from
            raise error
