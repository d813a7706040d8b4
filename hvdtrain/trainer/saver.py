"""Saving without stopping the training for long: rank 0 copies the state to host memory, a thread writes it."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from hvdtrain.errors import CheckpointError
from hvdtrain.models.weights import model_weights, parameter_names
from hvdtrain.rundir.checkpoints import Checkpoints
from hvdtrain.rundir.manifest import Manifest
from hvdtrain.rundir.retention import Retention
from hvdtrain.trainer.job import Job
from hvdtrain.trainer.skipped import SkippedSteps
from hvdtrain.trainer.state import Training, training_state
from hvdtrain.trainer.values import storable


class Saver:
    """Saves the checkpoints of one run, one at a time.

    A save that fails (disk full, permission lost) does not end the run: it is said and counted, the checkpoint before
    it stays good, and the next save tries again. Only the last one must succeed.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._thread: threading.Thread | None = None
        self._error: str | None = None
        self._num_failed = 0
        self._stall_s = 0.0
        self._has_saved = False

    def save(self, training: Training, evaluated: Mapping[str, float]) -> None:
        """Begin to save; waits for the save before. `evaluated` is what these weights reached, if known. Collective.

        Raises:
            DivergedError: as `train_step`.
        """
        job, checkpoints = self._job, self._job.run.checkpoints
        started = time.perf_counter()
        job.world.progress.enter("saving")
        self._wait()  # before the state is gathered: host memory holds one copy of it at a time
        with training.strategy.made_equal(job.world, training):
            state = training_state(job, training)
            if job.world.rank == 0:
                try:
                    arguments = self._arguments(training, state, evaluated)
                except (MemoryError, RuntimeError) as error:  # torch tells by a RuntimeError that there is no memory
                    self._fail(f"a save failed, as the state could not be copied to host memory: {error!r}")
                else:
                    self._begin(checkpoints, arguments)
        self._stall_s += time.perf_counter() - started
        self._has_saved = True

    def metrics(self) -> dict[str, float]:
        """Return how long saving has held up training, and how many saves failed, since the last call."""
        metrics: dict[str, float] = {}
        if self._has_saved:
            metrics["time/checkpoint_stall_s"] = self._stall_s
        if self._num_failed:
            metrics["checkpoint/failed"] = self._num_failed
        self._has_saved, self._num_failed, self._stall_s = False, 0, 0.0
        return metrics

    def finish(self) -> None:
        """Wait for the last save. Collective.

        Raises:
            CheckpointError: it failed, on every rank.
        """
        started = time.perf_counter()
        self._job.world.progress.enter("saving")
        self._wait()
        self._stall_s += time.perf_counter() - started
        error = self._job.world.broadcast_object(self._error, "save.finish")
        if error:
            failure = CheckpointError(error)
            failure.is_on_all_ranks = True
            raise failure

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Wait for a save that is under way, so that the process never leaves one half done."""
        self._wait()

    def _wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _arguments(self, training: Training, state: dict[str, Any], evaluated: Mapping[str, float]) -> dict[str, Any]:
        """Return what `Checkpoints.save` takes, in host memory."""
        job, config = self._job, self._job.config.checkpoint
        copied = {key: value for key, value in state.items() if key == "optimizer" and training.strategy.gathers_state}
        others = {key: value for key, value in state.items() if key not in copied}
        state = storable(others, "the state of the training", _to_host)
        return {
            "manifest": _manifest(job, training, evaluated),
            "weights": storable(model_weights(training.model), "the model's weights", _to_host),
            "state": {**state, **storable(copied, "the state of the training")},
            "retention": Retention(config.keep_last, config.keep_every),
            "parameters": parameter_names(training.model),
            "warn": job.log.say,
        }

    def _begin(self, checkpoints: Checkpoints, arguments: dict[str, Any]) -> None:
        self._thread = threading.Thread(target=self._write, args=(checkpoints, arguments), name="hvdtrain-save")
        try:
            self._thread.start()
        except RuntimeError:  # the system has no more threads: then training waits for the save
            self._thread = None
            self._write(checkpoints, arguments)

    def _write(self, checkpoints: Checkpoints, arguments: dict[str, Any]) -> None:
        self._error = None
        try:
            checkpoints.save(**arguments)
        except BaseException as error:  # of any type, sys.exit() too: a thread's exceptions are seen by nobody else
            self._fail(str(error) if isinstance(error, CheckpointError) else f"a save failed: {error!r}")

    def _fail(self, error: str) -> None:
        self._error = error
        self._num_failed += 1
        self._job.log.say(f"WARNING: {error}; training goes on, the next save tries again")


def _manifest(job: Job, training: Training, evaluated: Mapping[str, float]) -> Manifest:
    skipped = training.component(SkippedSteps)
    return Manifest(
        step=training.step,
        samples=job.order.samples_before(training.step),
        world_size=job.world.size,
        global_batch_size=job.plan.global_batch_size,
        micro_batch_size=job.plan.largest_micro_batch_size or job.plan.micro_batch_size,
        val_loss=evaluated.get("val/loss"),
        skipped_in_a_row=skipped.in_a_row if skipped else 0,
    )


def _to_host(tensor: Tensor) -> Tensor:
    """Return a copy that lies in host memory and changes no more."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)
    return copy.copy_(tensor.detach())
