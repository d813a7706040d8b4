"""pytest inside a real launch: every rank runs the same tests in the same order, and fails where any rank fails.

`tests/test_launches.py` starts `horovodrun -np N ... pytest tests/ranks` for each number of ranks and controller.
"""

import faulthandler
import os
import sys

import pytest
import torch

import hvdtrain
from hvdtrain.process.launch import detect_launch

SECONDS_PER_TEST = 180  # beside much other work


def pytest_ignore_collect(collection_path, config):
    return None if detect_launch().is_parallel else True


def pytest_collection_modifyitems(items):
    """Keep the tests that are meant for this number of ranks; `ranks(2, 4)` names them, no marker means any."""
    size = detect_launch().size
    wanted = [item for item in items if not (marks := list(item.iter_markers("ranks"))) or size in marks[0].args]
    items[:] = wanted


@pytest.fixture(scope="session")
def world():
    torch.set_num_threads(1)
    world = hvdtrain.init()
    yield world
    world.close()


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """Run a test on all ranks; one that hangs is ended with the stacks of all threads.

    A rank that fails alone must not leave the others inside a collective of a later test: outcomes are exchanged.
    """
    world = pyfuncitem.funcargs.get("world")
    faulthandler.dump_traceback_later(SECONDS_PER_TEST, exit=True, file=sys.__stderr__)
    error = None
    try:
        result = yield
    except BaseException as caught:
        error = caught
    if world is not None and not isinstance(error, pytest.skip.Exception):
        failed = [rank for rank, bad in enumerate(world.all_gather_object(error is not None, "outcome")) if bad]
        if failed and error is None:
            error = AssertionError(f"passed here, but failed on ranks {failed}")
    faulthandler.cancel_dump_traceback_later()
    if error is not None:
        raise error
    return result


@pytest.fixture
def shared_dir(world, tmp_path_factory):
    """A directory that all ranks (of one host) see."""
    path = tmp_path_factory.mktemp("shared") if world.rank == 0 else None
    return world.broadcast_object(path, f"shared_dir.{os.environ['PYTEST_CURRENT_TEST']}")
