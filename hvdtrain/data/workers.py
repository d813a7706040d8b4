"""Processes that read batches ahead, so that decoding and augmentation use cores of their own.

They are started anew (never forked: MPI and its threads do not survive that), without the launcher's variables, so that
nothing in them takes part in the job. They end with the rank.
"""

from __future__ import annotations

import importlib.machinery
import json
import os
import pickle
import pickletools
import select
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

from hvdtrain.data.dataset import Dataset
from hvdtrain.data.draws import Request
from hvdtrain.data.messages import receive, receive_batch, send
from hvdtrain.data.worker import Failure, Setup
from hvdtrain.errors import DataError, WorkerError
from hvdtrain.process.launch import DATA_WORKER

# By these a launcher tells a process that it is a rank.
_LAUNCHERS = ("OMPI_", "PMIX_", "PMI_", "PRTE_", "HOROVOD_", "MPI_", "MV2_", "MPIR_", "HYDRA_", "I_MPI_", "SLURM_STEP")
# Where the working directory comes first, as with `-c`, a `json.py` of the user's would be taken for Python's.
_START = (
    "import sys; sys.path.remove('') if '' in sys.path else None; import json; sys.path[:] = json.loads(sys.argv[2]);"
    " from hvdtrain.data.worker import main; main(int(sys.argv[1]))"
)
_DUMP_S = 0.5


class WorkerPool:
    """Reads batches in `count` processes, each in turn; they are started with the first batch.

    Args:
        data: can be pickled.
        count: how many processes.
        depth: how many batches are started beyond the one that is needed.
        owner: whose workers they are, for messages.
        patience_s: a worker that takes longer for a batch is taken to hang.
    """

    def __init__(self, data: Dataset, count: int, depth: int, owner: str, patience_s: float) -> None:
        self.depth = depth
        self._data, self._count, self._owner, self._patience_s = data, count, owner, patience_s
        self._workers: list[_Worker] = []
        self._started = 0

    def start(self, request: Request) -> Callable[[], Any]:
        """Have the next worker read a batch, after those that it was asked for before.

        Raises:
            DataError: the data set cannot be given to another process.
            WorkerError: a worker has died.
        """
        if not self._workers:
            setup = _setup_of(self._data)
            names = [f"data worker {number} of {self._owner}" for number in range(self._count)]
            self._workers = [_Worker(name, setup, self._patience_s) for name in names]
        worker = self._workers[self._started % self._count]
        self._started += 1
        return partial(worker.wait, worker.ask(request))

    def close(self) -> None:
        """End the workers, also while they read."""
        for worker in self._workers:
            worker.close()
        self._workers = []


class _Worker:
    """One process and the socket to it."""

    def __init__(self, name: str, setup: Setup, patience_s: float) -> None:
        self._name, self._patience_s = name, patience_s
        self._connection, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START, str(theirs.fileno()), json.dumps(sys.path)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=_environment(name),
                start_new_session=True,
            )
        self.close = weakref.finalize(self, _end, self._process, self._connection)
        self._asked: list[Request] = []
        self._answered = 0
        self._is_ready = False
        send(self._connection, setup)

    def ask(self, request: Request) -> int:
        """Send a request; returns its number."""
        self._asked.append(request)
        number = self._answered + len(self._asked) - 1
        self._checked(lambda: send(self._connection, (number, request)))
        return number

    def wait(self, number: int) -> Any:
        """Return the batch that was asked for by this number; batches before it that nobody wanted are dropped."""
        if not self._is_ready:
            _raise(self._checked(lambda: self._receive(receive)))
            self._is_ready = True
        while True:
            (answered, failure), batch = self._checked(lambda: self._receive(receive_batch))
            self._asked.pop(0)
            self._answered += 1
            if answered == number:
                _raise(failure)
                return batch

    def _checked(self, talk: Callable[[], Any]) -> Any:
        """Talk with the worker, and say how it ended where it does not live any more."""
        try:
            return talk()
        except (EOFError, OSError):
            raise WorkerError(f"{self._describe()} {self._how_it_ended()}{self._doing()}") from None

    def _receive(self, receive: Callable[[socket.socket], Any]) -> Any:
        """Wait until the worker sends something, or has died.

        Raises:
            WorkerError: it takes too long.
        """
        if select.select([self._connection], [], [], self._patience_s)[0]:
            return receive(self._connection)
        self._process.send_signal(signal.SIGUSR1)
        time.sleep(_DUMP_S)
        raise WorkerError(
            f"{self._describe()} hangs: it has sent nothing for {self._patience_s:g} s{self._doing()}. Where it is, its"
            " stack in this rank's error output says"
        )

    def _describe(self) -> str:
        return f"{self._name} (process {self._process.pid})"

    def _how_it_ended(self) -> str:
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "has closed its connection"
        if code == -signal.SIGKILL:
            return "was killed by SIGKILL, perhaps because memory ran out: try fewer --data.workers"
        if code < 0:
            return f"was killed by {signal.Signals(-code).name}"
        return f"has ended by itself with exit code {code}"

    def _doing(self) -> str:
        if not self._is_ready:
            return " before its first batch"
        samples = self._asked[0].samples.tolist() if self._asked else []
        return f" while it read the samples {', '.join(map(str, samples[:8]))}{', ...' * (len(samples) > 8)}"


class _RemoteTraceback(Exception):  # noqa: N818 - it only shows where the cause was raised
    """Where in a worker an exception was raised."""

    def __init__(self, text: str, users_place: str) -> None:
        super().__init__(text)
        self.users_place = users_place

    def __str__(self) -> str:
        return f"in a data worker:\n{self.args[0]}"


def _raise(failure: Failure | None) -> None:
    """Raise here what was raised there."""
    if failure is None:
        return
    cause = _RemoteTraceback(failure.text, failure.place)
    if failure.error is None:
        raise WorkerError(f"reading has failed in a data worker: {failure.text.strip().splitlines()[-1]}") from cause
    raise pickle.loads(failure.error) from cause


def _setup_of(data: Dataset) -> Setup:
    """Return all that makes the data set in another process.

    Raises:
        DataError: it cannot be pickled.
    """
    try:
        raw = pickle.dumps(data)
    except Exception as error:  # whatever __reduce__ and __getstate__ raise
        raise DataError(
            f"--data.workers needs data that can be pickled, and {type(data).__name__} cannot ({error}): leave lambdas,"
            " open files and locks out of the data set and its transforms, or read without workers (--data.workers 0)"
        ) from error
    return Setup(raw, getattr(sys.modules["__main__"], "__file__", None), _modules_by_file(raw))


def _modules_by_file(pickled: bytes) -> dict[str, str]:
    """Return the files of the modules that a pickle names and that another process cannot import by name."""
    names = {arg for _, arg, _ in pickletools.genops(pickled) if isinstance(arg, str) and arg in sys.modules}
    files = {name: getattr(sys.modules[name], "__file__", None) for name in names - {"__main__"}}
    return {name: file for name, file in files.items() if file and not _can_import(name)}


def _can_import(name: str) -> bool:
    try:
        return importlib.machinery.PathFinder.find_spec(name.partition(".")[0]) is not None
    except (ImportError, ValueError):
        return False


def _environment(name: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(_LAUNCHERS)}
    return {**kept, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", DATA_WORKER: name}


def _end(process: subprocess.Popen[bytes], connection: socket.socket) -> None:
    connection.close()
    process.kill()
    process.wait()
