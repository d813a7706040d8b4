"""Who reads batches: the caller when it needs one, or a thread ahead of it; processes are in `workers`."""

from __future__ import annotations

import inspect
import queue
import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from hvdtrain.data.dataset import Dataset
from hvdtrain.data.draws import Draws, Request, is_same_state, kept_random_state, random_state
from hvdtrain.data.nested import map_tensors, tensors_in
from hvdtrain.data.own_generators import generators_in
from hvdtrain.errors import DataError, one_line


class BatchSource:
    """Reads batches of a data set so that each sample draws its own random numbers.

    Data whose `batch` takes `draws` sees to that itself. Of other data that turns out to draw from the generators of
    torch, numpy or Python, or keeps one of its own, samples are read one at a time, each with its own seed, and put
    together.
    """

    def __init__(self, data: Dataset) -> None:
        self.data = data
        self._takes_draws = "draws" in inspect.signature(data.batch).parameters
        self._draws_nothing = says_it_reads_ahead(data)
        self._own = () if self._takes_draws or self._draws_nothing else generators_in(data)
        self._draws_itself = bool(self._own)

    def read(self, request: Request) -> Any:
        """Return a batch.

        Raises:
            DataError: samples that draw random numbers cannot be put together.
            Exception: whatever the data raises.
        """
        read: Callable[..., Any] = self.data.batch
        if self._takes_draws:
            return read(request.samples, draws=request.draws)
        if self._draws_nothing:
            return read(request.samples)
        with kept_random_state() as before:
            if self._draws_itself and len(request.samples):
                return self._one_by_one(request)
            batch = read(request.samples)
            if is_same_state(before, random_state()) or len(request.samples) == 0:
                return batch
            self._draws_itself = True
            return self._one_by_one(request)

    def _one_by_one(self, request: Request) -> Any:
        parts = []
        for i in range(len(request.samples)):
            request.draws.seed_generators(i, self._own)
            parts.append(self.data.batch(request.samples[i : i + 1]))
        try:
            return _together(parts)
        except (RuntimeError, TypeError, ValueError) as error:
            raise DataError(
                f"{type(self.data).__name__}.batch draws random numbers, so its samples are read one by one, but do not"
                f" fit together then ({one_line(error)}): let it take a second argument, `draws`, and draw"
                " from draws.generator(i) for its i-th sample"
            ) from error


def _together(parts: list[Any]) -> Any:
    """Put batches of one sample together along their first dimension."""
    tensors = [list(tensors_in(part)) for part in parts]
    joined = iter([torch.cat(same) for same in zip(*tensors, strict=True)])
    return map_tensors(lambda tensor: next(joined), parts[0])


def read_samples(data: Dataset, samples: Tensor) -> Any:
    """Return the batch of `samples`, int64 `(n,)`, as they are in epoch 0 with seed 0: to look at, not to train on."""
    return BatchSource(data).read(Request(samples, Draws(0, 0, samples)))


class Reader(Protocol):
    """Reads batches, some of them before they are needed."""

    depth: int
    """How many batches may be started beyond the one that is needed; 0 where nothing is read ahead."""

    def start(self, request: Request) -> Callable[[], Any]:
        """Begin to read; returns a function that waits for the batch, or raises what reading it raised."""
        ...

    def close(self) -> None:
        """Give up what was started and end."""
        ...


class Inline:
    """Reads when the batch is needed."""

    depth = 0

    def __init__(self, source: BatchSource) -> None:
        self._source = source

    def start(self, request: Request) -> Callable[[], Any]:
        """Return a function that reads the batch."""
        return partial(self._source.read, request)

    def close(self) -> None:
        """Do nothing."""


class Threaded:
    """Reads in a thread. It ends with `close`, or with the reader, or with the process, also while a call hangs."""

    def __init__(self, source: BatchSource, depth: int) -> None:
        self.depth = depth
        self._source = source
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], queue.SimpleQueue[Any]] | None] = queue.SimpleQueue()
        # A new thread is on GPU 0: what a data set puts on "the" GPU would lie on that of another rank.
        gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
        threading.Thread(target=_work, args=(self._calls, gpu), name="hvdtrain-data", daemon=True).start()
        self.close = weakref.finalize(self, self._calls.put, None)

    def start(self, request: Request) -> Callable[[], Any]:
        """Have the thread read a batch, after those that it was asked for before."""
        answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._calls.put((partial(self._source.read, request), answers))

        def wait() -> Any:
            answer, error = answers.get()
            if error is not None:
                raise error
            return answer

        return wait


def says_it_reads_ahead(data: Dataset) -> bool:
    """Tell whether another thread may call the data's `batch`, which draws no random numbers of its own."""
    return _says(data, "reads_ahead")


def says_it_is_in_memory(data: Dataset) -> bool:
    """Tell whether the data's `batch` only copies what is in memory."""
    return _says(data, "is_in_memory")


def _says(data: Dataset, name: str) -> bool:
    """Tell whether the class that defines the data's `batch` says so: what a subclass does instead, nobody knows."""
    owner = next((kind for kind in type(data).__mro__ if "batch" in vars(kind)), type(data))
    return bool(vars(owner).get(name, False))


def _work(
    calls: queue.SimpleQueue[tuple[Callable[[], Any], queue.SimpleQueue[Any]] | None], gpu: int | None = None
) -> None:
    torch.set_num_threads(1)
    if gpu is not None:
        torch.cuda.set_device(gpu)
    while (job := calls.get()) is not None:
        call, answers = job
        try:
            answers.put((call(), None))
        except BaseException as error:
            answers.put((None, error))
        del job, call, answers  # or the last batch stays in memory while the thread waits
