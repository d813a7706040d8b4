"""Which GPU what is done lands on: that of the rank, in each thread, whichever was current before."""

import dataclasses
import threading

import pytest
import torch
from test_components import job_of

from hvdtrain.compat import horovod as compat
from hvdtrain.compat import place
from hvdtrain.data.dataset import TensorSamples
from hvdtrain.data.draws import Draws, Request
from hvdtrain.data.loader import Reading
from hvdtrain.process.launch import Launch
from hvdtrain.process.progress import Progress
from hvdtrain.trainer import state
from hvdtrain.world import SoloWorld, start


class Where(TensorSamples):
    """Tells which GPU is current where its batches are read."""

    reads_ahead = True
    on: dict[int, int] = {}  # noqa: RUF012

    def batch(self, indices):
        return self.on.get(threading.get_ident())


def test_the_thread_that_reads_is_on_the_gpu_of_its_rank(monkeypatch):
    """A new thread is on GPU 0, and a data set may put its batches on "the" GPU."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: Where.on.update({threading.get_ident(): device}))
    reader = Reading(ahead=1).reader_of(Where(torch.arange(4.0)), "rank 0")
    try:
        assert reader.start(Request(torch.arange(2), Draws(0, 0, torch.arange(2))))() == 3
    finally:
        reader.close()


def test_training_is_on_its_own_gpu_whichever_was_current(monkeypatch, tmp_path):
    """Streams and events are those of the current one: copies for a checkpoint would be waited for on another."""
    chosen = []

    class NoGpuError(Exception):
        """The rest needs one."""

    def stop(*_):
        raise NoGpuError

    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(state, "prepare_model", stop)
    job = dataclasses.replace(job_of(tmp_path), world=SoloWorld(torch.device("cuda", 1), Launch("none")))
    with pytest.raises(NoGpuError):
        state.start_training(job)
    assert chosen == [torch.device("cuda", 1)]


def test_one_rank_takes_the_gpu_that_its_program_has_chosen(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    assert start.solo_device() == torch.device("cuda", 2)


@pytest.mark.parametrize(
    ("device", "asked", "expected"),
    [("cuda:1", (), 1), ("cuda:1", (3,), 3), ("cpu", (), -1), ("cpu", (-1,), -1)],
)
def test_who_has_joined_gives_zeros_where_the_others_have_tensors(monkeypatch, device, asked, expected):
    """In host memory they would go by MPI, while the others are in NCCL: all would wait for ever."""
    horovod = pytest.importorskip("hvdtrain.world.horovod", exc_type=ImportError)
    given = []
    monkeypatch.setattr(horovod.hvd, "join", lambda device=-1: given.append(device) or 0)
    world = object.__new__(horovod.HorovodWorld)  # no rank was started
    world.device, world.progress = torch.device(device), Progress()
    monkeypatch.setattr(place, "_worlds", [world])
    assert compat.join(*asked) == 0
    assert given == [expected]
