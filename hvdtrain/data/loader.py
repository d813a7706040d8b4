"""From an order to batches: a rank's micro-batches, the next ones read while the present one is computed."""

from __future__ import annotations

import inspect
import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from hvdtrain.data.dataset import Dataset
from hvdtrain.data.draws import Draws

Batch = tuple[Tensor, ...]

_Place = tuple[int, int]
"""A step and the number of a micro-batch in it."""


class Order(Protocol):
    """Which samples a rank takes in each step: a pure function of the step, so that training can begin at any."""

    @property
    def seed(self) -> int:
        """Return the seed of what samples draw at random."""
        ...

    def epoch(self, step: int) -> int:
        """Return the number of the pass over the data that the step after `step` completed ones belongs to."""
        ...

    def batches(self, step: int, rank: int, in_step: bool = False) -> list[Tensor]:
        """Return the samples, int64 `(n,)`, of each micro-batch of a rank; none in a step without samples for it.

        With `in_step`, every rank has equally many, empty ones if need be.
        """
        ...


class Loader:
    """Reads a rank's micro-batches in their order.

    Where the data says that its `batch` may be called by another thread (`Dataset.reads_ahead`), a thread reads those
    that follow. It ends with `close`, or with the loader.

    Args:
        data: what is read.
        order: which samples each step takes.
        rank: whose part of them.
        in_step: every rank has equally many micro-batches, empty ones if need be.
        pin_memory: put batches into page-locked memory, from which a GPU copies while it computes.
        depth: how many micro-batches are read ahead.
    """

    def __init__(
        self,
        data: Dataset,
        order: Order,
        rank: int,
        *,
        in_step: bool = False,
        pin_memory: bool = False,
        depth: int = 1,
    ) -> None:
        self._data, self._order, self._rank, self._in_step = data, order, rank, in_step
        self._pin_memory, self._depth = pin_memory, depth
        self._takes_draws = "draws" in inspect.signature(data.batch).parameters
        self._thread = _Thread() if depth and _may_read_ahead(data) else None
        self._end = weakref.finalize(self, self._thread.end) if self._thread else None
        self._ahead: deque[tuple[_Place, Callable[[], Batch]]] = deque()
        self._known: tuple[int, list[Tensor]] = (-1, [])

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let the thread end, after what it is reading; whatever is read afterwards is not read ahead."""
        self._ahead.clear()
        self._thread = None
        if self._end is not None:
            self._end()

    def read(self, step: int, place: int) -> Batch:
        """Return micro-batch number `place` of the step that follows `step` completed ones, on the CPU.

        Micro-batches may be asked for in any order; those that are asked for in turn have been read ahead.

        Raises:
            Exception: whatever the data raises, here and not in the other thread.
        """
        wanted = (step, place)
        if self._ahead and self._ahead[0][0] != wanted:
            self._ahead.clear()
        batch = self._ahead.popleft()[1]() if self._ahead else self._load(wanted)
        self._read_ahead(wanted)
        return batch

    def _read_ahead(self, present: _Place) -> None:
        """Have the thread read what follows, up to `depth` micro-batches."""
        if self._thread is None:
            return
        last = self._ahead[-1][0] if self._ahead else present
        while len(self._ahead) < self._depth and (following := self._after(last)) is not None:
            self._ahead.append((following, self._thread.start_call(partial(self._fetch, *self._request(following)))))
            last = following

    def _after(self, place: _Place) -> _Place | None:
        """Return the micro-batch after this one; None at the end of the order."""
        step, number = place
        if number + 1 < len(self._batches(step)):
            return step, number + 1
        # A rank may have no sample in the short batch at the end of an epoch, but then it has in the next step.
        return next(((later, 0) for later in (step + 1, step + 2) if self._batches(later)), None)

    def _batches(self, step: int) -> list[Tensor]:
        if self._known[0] != step:
            self._known = step, self._order.batches(step, self._rank, self._in_step)
        return self._known[1]

    def _request(self, place: _Place) -> tuple[Tensor, Draws]:
        """Return what a micro-batch holds, and what its samples draw."""
        step, number = place
        samples = self._batches(step)[number]
        return samples, Draws(self._order.seed, self._order.epoch(step), samples)

    def _load(self, place: _Place) -> Batch:
        return self._fetch(*self._request(place))

    def _fetch(self, samples: Tensor, draws: Draws) -> Batch:
        read: Callable[..., Batch] = self._data.batch
        batch = read(samples, draws=draws) if self._takes_draws else read(samples)
        return tuple(tensor.pin_memory() for tensor in batch) if self._pin_memory else batch


def _may_read_ahead(data: Dataset) -> bool:
    """Return whether the class that defines the data's `batch` says so: what a subclass does instead, nobody knows."""
    owner = next(kind for kind in type(data).__mro__ if "batch" in vars(kind))
    return bool(vars(owner).get("reads_ahead", False))


class _Thread:
    """One thread that makes calls in turn. It ends when asked to, or with the process, also while a call hangs."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], queue.SimpleQueue[Any]] | None] = queue.SimpleQueue()
        threading.Thread(target=_work, args=(self._calls,), name="hvdtrain-data", daemon=True).start()

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

    def end(self) -> None:
        """Let the thread end after the calls that were started."""
        self._calls.put(None)


def _work(calls: queue.SimpleQueue[tuple[Callable[[], Any], queue.SimpleQueue[Any]] | None]) -> None:
    torch.set_num_threads(1)
    while (job := calls.get()) is not None:
        call, answers = job
        try:
            answers.put((call(), None))
        except BaseException as error:
            answers.put((None, error))
        del job, call, answers  # or the last batch stays in memory while the thread waits
