"""From an order to batches: a rank's micro-batches, the next ones read while the present one is computed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from hvdtrain.data.dataset import Dataset
from hvdtrain.data.draws import Request
from hvdtrain.data.nested import map_tensors
from hvdtrain.data.pinned import pinned
from hvdtrain.data.readers import BatchSource, Inline, Reader, Threaded, says_it_is_in_memory, says_it_reads_ahead
from hvdtrain.data.workers import WorkerPool

_Place = tuple[int, int]
"""A step and the number of a micro-batch in it."""


class Order(Protocol):
    """Which samples a rank takes in each step: a pure function of the step, so that training can begin at any."""

    def requests(self, step: int, rank: int, in_step: bool = False) -> list[Request]:
        """Return a rank's micro-batches in the step after `step` completed ones; none where it has no samples.

        With `in_step`, every rank has equally many, empty ones if need be.
        """
        ...


@dataclass(frozen=True)
class Reading:
    """By whom batches are read, and how far ahead."""

    workers: int = 0
    """Processes of each rank."""
    ahead: int | None = None
    """Batches beyond the one that is needed. None: two a process, one where a thread reads, none of data in memory."""
    patience_s: float = 150.0
    """A worker that takes longer for a batch is taken to hang."""

    def reader_of(self, data: Dataset, owner: str) -> Reader:
        """Return what reads `data`."""
        if self.workers and not getattr(data, "is_sequential", False):
            depth = 2 * self.workers if self.ahead is None else self.ahead
            return WorkerPool(data, self.workers, depth, owner, self.patience_s)
        depth = (0 if says_it_is_in_memory(data) else 1) if self.ahead is None else self.ahead
        return Threaded(BatchSource(data), depth) if depth and says_it_reads_ahead(data) else Inline(BatchSource(data))


class Loader:
    """Reads a rank's micro-batches in their order, those that follow while the present one is computed.

    Who reads them: processes, where there are to be some (`workers`); else a thread, where the data says that its
    `batch` may be called by another thread (`Dataset.reads_ahead`); else the caller, when it needs them. They end with
    `close`, or with the loader.

    Args:
        data: what is read.
        order: which samples each step takes.
        rank: whose part of them.
        in_step: every rank has equally many micro-batches, empty ones if need be.
        pin_memory: put batches into page-locked memory, from which a GPU copies while it computes.
        reading: by whom, and how far ahead; None: no processes, one batch ahead.
    """

    def __init__(
        self,
        data: Dataset,
        order: Order,
        rank: int,
        *,
        in_step: bool = False,
        pin_memory: bool = False,
        reading: Reading | None = None,
    ) -> None:
        self._order, self._rank, self._in_step, self._pin_memory = order, rank, in_step, pin_memory
        self._reader = (reading or Reading()).reader_of(data, f"rank {rank}")
        self._ahead: deque[tuple[_Place, Callable[[], Any]]] = deque()
        self._known: tuple[int, list[Request]] = (-1, [])

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the thread, as soon as it has read what it is reading, and the processes at once."""
        self._ahead.clear()
        self._reader.close()

    def read(self, step: int, place: int) -> Any:
        """Return micro-batch number `place` of the step that follows `step` completed ones, on the CPU.

        Micro-batches may be asked for in any order; those that are asked for in turn have been read ahead.

        Raises:
            WorkerError: a process that reads has died or hangs.
            Exception: whatever the data raises, here and not where it is read.
        """
        wanted = (step, place)
        if self._ahead and self._ahead[0][0] != wanted:
            self._ahead.clear()
        if not self._ahead:
            self._start(wanted)
        self._read_ahead()
        batch = self._ahead.popleft()[1]()
        return map_tensors(pinned, batch) if self._pin_memory else batch

    def _start(self, place: _Place) -> None:
        step, number = place
        self._ahead.append((place, self._reader.start(self._requests(step)[number])))

    def _read_ahead(self) -> None:
        """Start to read what follows the batch that is needed, as many as the reader has room for."""
        while len(self._ahead) <= self._reader.depth and (following := self._after(self._ahead[-1][0])) is not None:
            self._start(following)

    def _after(self, place: _Place) -> _Place | None:
        """Return the micro-batch after this one; None at the end of the order."""
        step, number = place
        if number + 1 < len(self._requests(step)):
            return step, number + 1
        # A rank may have no sample in the short batch at the end of an epoch, but then it has in the next step.
        return next(((later, 0) for later in (step + 1, step + 2) if self._requests(later)), None)

    def _requests(self, step: int) -> list[Request]:
        if self._known[0] != step:
            self._known = step, self._order.requests(step, self._rank, self._in_step)
        return self._known[1]
