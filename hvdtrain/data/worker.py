"""A process that reads batches for a rank; `workers` starts it. It knows neither MPI nor Horovod."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import importlib.util
import io
import pickle
import runpy
import signal
import socket
import sys
import types
from typing import Any, NamedTuple

import torch

from hvdtrain.data.draws import Request
from hvdtrain.data.messages import receive, send, send_batch
from hvdtrain.data.readers import BatchSource
from hvdtrain.errors import DataError, one_line
from hvdtrain.process.tracebacks import place_of, stack_of

_PR_SET_PDEATHSIG = 1


class Setup(NamedTuple):
    """What a worker must know before its first batch."""

    data: bytes
    """The pickled data set."""
    main_path: str | None
    """The file that is `__main__` in the rank, which classes of the data set may come from."""
    modules: dict[str, str]
    """Files of modules that cannot be imported by name, such as a recipe's."""


class Failure(NamedTuple):
    """An exception that reading has raised."""

    error: bytes | None
    """Pickled; None where that is impossible."""
    text: str
    """Its traceback."""
    place: str = ""
    """Where in a user's code it was raised."""


def main(descriptor: int) -> None:
    """Answer requests on a socket until the other side closes it."""
    _leave_signals_to_the_rank()
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, OSError), socket.socket(fileno=descriptor) as connection:
        _work(connection)


def _work(connection: socket.socket) -> None:
    try:
        setup: Setup = receive(connection)
        source = BatchSource(_load(setup))
    except Exception as error:
        send(connection, _failure(error))
        return
    send(connection, None)
    while True:
        number, request = receive(connection)
        _answer(connection, source, number, request)


def _answer(connection: socket.socket, source: BatchSource, number: int, request: Request) -> None:
    batch: Any = None
    try:
        batch, failure = source.read(request), None
    except Exception as error:
        failure = _failure(error)
    try:
        send_batch(connection, (number, failure), batch)
    except OSError:
        raise
    except Exception as error:  # a batch that holds what cannot be pickled: as many types as there are objects
        send_batch(connection, (number, _failure(_unsendable(error))), None)


def _unsendable(error: Exception) -> DataError:
    told = DataError(
        f"a batch holds what no process can give to another ({one_line(error)}): let the data set"
        " and collate return tensors, numbers and texts, or read without workers (--data.workers 0)"
    )
    told.__cause__ = error
    return told


def _failure(error: Exception) -> Failure:
    text, place = stack_of(error), place_of(error)
    try:
        raw = pickle.dumps(error)
        pickle.loads(raw)
    except Exception:
        return Failure(None, text, place)
    return Failure(raw, text, place)


def _leave_signals_to_the_rank() -> None:
    """End with the rank, and only with it: a signal to the job reaches the rank, which saves first."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # the rank asks a worker that hangs where it is
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class _Unpickler(pickle.Unpickler):
    """Finds classes of the rank's main program and of modules that are not on the path."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(io.BytesIO(setup.data))
        self._setup = setup

    def find_class(self, module_name: str, name: str) -> Any:
        if module_name == "__main__" and self._setup.main_path:
            _load_main(self._setup.main_path)
        elif module_name in self._setup.modules and module_name not in sys.modules:
            _load_file(module_name, self._setup.modules[module_name])
        return super().find_class(module_name, name)


def _load(setup: Setup) -> Any:
    return _Unpickler(setup).load()


def _load_main(path: str) -> None:
    """Run the main program's file as a module: what stands under `if __name__ == "__main__"` is left out."""
    if getattr(sys.modules["__main__"], "__file__", None) == path:
        return
    module = types.ModuleType("__mp_main__")
    module.__dict__.update(runpy.run_path(path, run_name="__mp_main__"))
    sys.modules["__main__"] = sys.modules["__mp_main__"] = module


def _load_file(name: str, path: str) -> None:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
