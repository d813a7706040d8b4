"""Saving without stopping the training for long: the state is copied to host memory, a thread writes it.

Where ranks have much for themselves (`--optim.shard`, codecs that remember gradients, local updates), each writes its
own part (`rundir/parts.py`). What is small is gathered, and rank 0 alone writes; so it does where the run directory is
not the same on all hosts.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from hvdtrain.errors import CheckpointError, on_all_ranks
from hvdtrain.models.weights import model_weights, parameter_names
from hvdtrain.rundir.checkpoints import Checkpoints
from hvdtrain.rundir.directory import Whereabouts
from hvdtrain.rundir.manifest import Manifest
from hvdtrain.rundir.parts import Receipt, Receipts, leave_failure, leave_mark, remove_mark, seen_marks, write_part
from hvdtrain.rundir.retention import Retention
from hvdtrain.trainer.job import Job
from hvdtrain.trainer.saved_state import divided_state, is_large, resting_tensors, training_state
from hvdtrain.trainer.skipped import SkippedSteps
from hvdtrain.trainer.snapshot import Snapshot, to_host
from hvdtrain.trainer.state import Training
from hvdtrain.trainer.values import storable

# For the parts of other ranks, where this one leaves with an exception and some of them may be gone.
_LAST_WAIT_S = 10.0


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
        self._token: str | None = None
        """Of the folders to which this run's ranks write; empty: they do not share a directory. None: not known."""
        self._num_divided = 0
        self._is_divided = False
        """The save that is under way is written by all ranks."""
        self._receipt: Receipt | None = None
        """This rank's for its part of that save, once it is written; rank 0 takes its own by itself."""
        self._receipts: Receipts | None = None
        self._whereabouts = Whereabouts(job.run)
        is_gpu = job.world.device.type == "cuda"
        self._snapshot = Snapshot(job.world.device) if is_gpu else None

    def save(self, training: Training, evaluated: Mapping[str, float], beside: bool = False) -> None:
        """Begin to save; waits for the save before. Collective.

        Args:
            training: what is saved.
            evaluated: what these weights reached, if known.
            beside: a GPU may copy weights while it goes on, as whoever changes them calls `training.before_change`.

        Raises:
            DivergedError: as `train_step`.
        """
        job, checkpoints = self._job, self._job.run.checkpoints
        started = time.perf_counter()
        job.world.progress.enter("saving")
        self._wait_for_all()  # before the state is copied: host memory holds one copy of it at a time
        if self._snapshot is not None:
            self._snapshot.begin()
        with training.strategy.made_equal(job.world, training):
            self._is_divided = is_large(job, training) and self._share_directory()
            if self._is_divided:
                self._save_divided(training, evaluated, checkpoints)
            else:
                state = training_state(job, training)
                if job.world.rank == 0:
                    self._try_to(lambda: self._save_alone(training, state, evaluated), self._fail)
            if self._snapshot is not None:
                training.being_copied = self._snapshot
                if not (beside and training.weights_rest and training.strategy.rests_between_updates):
                    training.before_change()
        self._stall_s += time.perf_counter() - started
        self._has_saved = True

    def _save_alone(self, training: Training, state: dict[str, Any], evaluated: Mapping[str, float]) -> None:
        copied = {key: value for key, value in state.items() if key == "optimizer" and training.strategy.gathers_state}
        others = {key: value for key, value in state.items() if key not in copied}
        state = storable(others, "the state of the training", self._copy)
        state |= storable(copied, "the state of the training")
        arguments = self._arguments(training, state, evaluated)
        self._start_copies(training)
        self._begin(lambda: self._write(arguments))

    def _save_divided(self, training: Training, evaluated: Mapping[str, float], checkpoints: Checkpoints) -> None:
        job = self._job
        self._num_divided += 1
        folder = checkpoints.folder_of_parts(training.step, f"{self._token}-{self._num_divided}")
        rank, self._receipt = job.world.rank, None
        receipts = self._receipts = Receipts(folder, job.world.size) if rank == 0 else None
        state, part = divided_state(job, training)

        def begin() -> None:
            own = storable(part, "the state of this rank", self._copy)
            if receipts is None:
                self._start_copies(training)
                self._begin(lambda: self._write_part(folder, own))
                return
            of_all = storable(state, "the state of the training", self._copy)
            arguments = {**self._arguments(training, of_all, evaluated), "receipts": receipts}
            self._start_copies(training)

            def write() -> None:
                receipts.note(0, self._written_part(folder, own))
                self._write(arguments)

            self._begin(write)

        def give_up(error: str) -> None:
            if rank == 0:
                self._fail(error)
            else:
                self._receipt = leave_failure(folder, rank, error)

        self._try_to(begin, give_up)

    def _write_part(self, folder: Path, part: dict[str, Any]) -> None:
        self._receipt = self._written_part(folder, part)

    def _written_part(self, folder: Path, part: dict[str, Any]) -> Receipt:
        rank = self._job.world.rank
        try:
            self._arrive()
        except RuntimeError as error:  # of the GPU
            return leave_failure(folder, rank, f"the state could not be copied to host memory ({error})")
        return write_part(folder, rank, part)

    def _copy(self, tensor: Tensor) -> Tensor:
        """Return a copy in host memory, or where it will be."""
        return to_host(tensor) if self._snapshot is None else self._snapshot.take(tensor)

    def _start_copies(self, training: Training) -> None:
        if self._snapshot is not None:
            self._snapshot.start(resting_tensors(training))

    def _arrive(self) -> None:
        """Wait until what is to be written is there."""
        if self._snapshot is not None:
            self._snapshot.arrive()

    def _share_directory(self) -> bool:
        """Return whether rank 0 sees what other ranks write to its checkpoints; looked at once. Collective."""
        if self._token is None:
            world, folder = self._job.world, self._job.run.checkpoints.folder
            token = secrets.token_hex(4)
            if world.rank == 0:
                self._try_to(lambda: folder.mkdir(parents=True, exist_ok=True), lambda error: None)
            token = str(world.broadcast_object(token, "save.token"))
            leave_mark(folder, token, world.rank)
            world.barrier("save.marks")
            seen = seen_marks(folder, token, world.size) if world.rank == 0 else None
            missing = sorted({*range(world.size)} - set(world.broadcast_object(seen, "save.seen") or ()))
            remove_mark(folder, token, world.rank)
            if missing:
                self._job.log.say(
                    f"WARNING: {folder} of rank {', '.join(map(str, missing))} is another than rank 0's: the hosts"
                    " share no directory, so every save gathers the state of all ranks on rank 0, and takes longer."
                    " A --run-dir on a file system that all hosts see is written by all ranks at once"
                )
            self._token = "" if missing else token
        return bool(self._token)

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
        self._wait_for_all()
        self._stall_s += time.perf_counter() - started
        error = self._job.world.broadcast_object(self._error, "save.finish")
        if error:
            raise on_all_ranks(CheckpointError(error))

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Wait for a save that is under way, so that the process never leaves one half done."""
        if self._receipts is not None:
            self._receipts.give_up(_LAST_WAIT_S)
        self._wait()

    def _wait_for_all(self) -> None:
        """Wait for the save that is under way. Collective where all ranks write it."""
        if self._is_divided:
            rank = self._job.world.rank
            if rank:
                self._wait()
            receipts = self._job.world.all_gather_object(self._receipt if rank else None, "save.receipts")
            if self._receipts is not None:
                self._receipts.tell(receipts)
            self._wait()
            # Only now may others write again: rank 0 has removed what interrupted saves left behind.
            self._job.world.barrier("save.ended")
            self._is_divided, self._receipts = False, None
        self._wait()

    def _wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _arguments(self, training: Training, state: dict[str, Any], evaluated: Mapping[str, float]) -> dict[str, Any]:
        """Return what `Checkpoints.save` takes, in host memory."""
        job, config = self._job, self._job.config.checkpoint
        return {
            "manifest": _manifest(job, training, evaluated),
            "weights": storable(model_weights(training.model), "the model's weights", self._copy),
            "state": state,
            "retention": Retention(config.keep_last, config.keep_every),
            "parameters": parameter_names(training.model),
            "warn": job.log.say,
        }

    def _try_to(self, action: Callable[[], None], fail: Callable[[str], None]) -> None:
        try:
            action()
        except (MemoryError, RuntimeError, OSError) as error:  # torch tells by a RuntimeError that there is no memory
            fail(f"a save failed, as the state could not be copied to host memory: {error!r}")

    def _begin(self, write: Callable[[], None]) -> None:
        self._thread = threading.Thread(target=write, name="hvdtrain-save")
        try:
            self._thread.start()
        except RuntimeError:  # the system has no more threads: then training waits for the save
            self._thread = None
            write()

    def _write(self, arguments: dict[str, Any]) -> None:
        self._error = None
        try:
            self._arrive()
            self._whereabouts.warn(self._job.log.say)
            self._job.run.checkpoints.save(**arguments)
            self._whereabouts.note()
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
