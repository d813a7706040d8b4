"""Micro-batches of a rank, the next one read by another thread while the present one is computed."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

import torch

from hvdtrain.data.dataset import Dataset
from hvdtrain.trainer.job import Job
from hvdtrain.trainer.task import Batch


class BatchReader:
    """Reads micro-batches in order; ahead, where the data says that its `batch` may be called by another thread.

    Args:
        job: what is trained.
        in_step: every rank has equally many micro-batches, empty ones if need be.
    """

    def __init__(self, job: Job, in_step: bool) -> None:
        self._data, self._order, self._rank, self._in_step = job.task.train_data, job.order, job.world.rank, in_step
        self._is_pinning = job.world.device.type == "cuda"
        self._thread = _Thread() if _may_read_ahead(self._data) else None
        self._ahead: tuple[tuple[int, int], Callable[[], Batch | None]] | None = None

    def read(self, step: int, place: int, last: int) -> Batch:
        """Return this rank's micro-batch number `place` of a step, whose last one is `last`, on the CPU.

        Raises:
            Exception: whatever the data raises, here and not in the other thread.
        """
        wanted = (step, place)
        ahead = self._ahead
        batch = ahead[1]() if ahead is not None and ahead[0] == wanted else self._load(wanted)
        assert batch is not None
        if self._thread is not None:
            following = (step, place + 1) if place < last else (step + 1, 0)
            self._ahead = following, self._thread.start_call(lambda: self._load(following))
        return batch

    def _load(self, wanted: tuple[int, int]) -> Batch | None:
        """Return a micro-batch, None where this rank has none in a short batch."""
        step, place = wanted
        batches = self._order.micro_batches(step, self._rank, self._in_step)
        if place >= len(batches):
            return None
        batch = self._data.batch(self._order.global_batch(step)[batches[place]])
        return tuple(tensor.pin_memory() for tensor in batch) if self._is_pinning else batch


def _may_read_ahead(data: Dataset) -> bool:
    """Return whether the class that defines the data's `batch` says so: what a subclass does instead, nobody knows."""
    owner = next(kind for kind in type(data).__mro__ if "batch" in vars(kind))
    return bool(vars(owner).get("reads_ahead", False))


class _Thread:
    """One thread that makes calls in turn. It ends with the process, also while a call hangs."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], queue.SimpleQueue[Any]]] = queue.SimpleQueue()
        threading.Thread(target=self._work, name="hvdtrain-data", daemon=True).start()

    def start_call(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """Have `call` made; returns a function that waits for its answer, or raises what it raised."""
        answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._calls.put((call, answers))

        def wait() -> Any:
            answer, error = answers.get()
            if error is not None:
                raise error
            return answer

        return wait

    def _work(self) -> None:
        torch.set_num_threads(1)
        while True:
            call, answers = self._calls.get()
            try:
                answers.put((call(), None))
            except BaseException as error:
                answers.put((None, error))
