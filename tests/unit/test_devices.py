"""Which GPU what is done lands on: that of the rank, in each thread, whichever was current before."""

import dataclasses
import threading

import pytest
import torch
from test_components import job_of
from thread_world import Meeting, ThreadWorld, run_ranks

from hvdtrain.compat import horovod as compat
from hvdtrain.compat import place
from hvdtrain.data.dataset import TensorSamples
from hvdtrain.data.draws import Draws, Request
from hvdtrain.data.loader import Reading
from hvdtrain.errors import LaunchError
from hvdtrain.models.private_torch import FakeTensorMode
from hvdtrain.process.launch import Launch
from hvdtrain.process.progress import Progress
from hvdtrain.trainer import state
from hvdtrain.world import SoloWorld, start
from hvdtrain.world.scattering import on_own_gpu, without_gpus


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
    ("unused", "why"), [("", "none on b: leave"), ("4 of NVIDIA here: old", "none on b (4 of NVIDIA here: old): leave")]
)
def test_hosts_with_gpus_and_hosts_without_are_refused_at_once(monkeypatch, unused, why):
    """Those with GPUs would wait for the others in NCCL, for three minutes, and name its interfaces for the reason."""
    worlds = {}

    def here():
        return worlds[threading.get_ident()]

    monkeypatch.setattr(start, "connect", lambda groups: here())
    monkeypatch.setattr(start.socket, "gethostname", lambda: "ab"[here().rank // 2])
    monkeypatch.setattr(start, "visible_gpus", lambda: ("x", "y") if here().rank < 2 else ())
    monkeypatch.setattr(start, "unused_gpus", lambda: unused if here().rank >= 2 else "")

    def work(world):
        worlds[threading.get_ident()] = world
        world.local_rank = world.rank % 2
        with pytest.raises(LaunchError) as refused:
            start.init()
        assert refused.value.exit_code == 1  # `supervise` starts it again, without a new host
        return str(refused.value)

    said = run_ranks(4, work)
    assert len({*said}) == 1
    assert f"ranks on a train on GPUs, and torch uses {why}" in said[0]


class Joining(ThreadWorld):
    """One of two ranks, which notes where it would have Horovod make zeros."""

    def __init__(self):
        super().__init__(0, Meeting(2))
        self.device, self.given = torch.device("cuda", 0), []

    def answer_with_zeros(self, gpu=None):
        self.given.append(gpu)
        return 1

    def agrees(self, value, name):
        return True  # the other rank is not there to be asked


@pytest.mark.parametrize(
    ("gradients", "asked", "expected"),
    [
        ("cuda:1", (), 1),
        ("cuda:1", (3,), 3),
        ("cpu", (), None),
        ("cpu", (-1,), None),
        (None, (), None),
        (None, (2,), 2),
    ],
)
def test_who_has_joined_gives_zeros_where_the_others_have_gradients(monkeypatch, gradients, asked, expected):
    """In host memory they would go by MPI, while the others are in NCCL: all would wait for ever.

    Not where the rank has a GPU: a program may train on the CPU all the same.
    """
    world = Joining()
    monkeypatch.setattr(place, "_worlds", [world])
    with FakeTensorMode(allow_non_fake_inputs=True):
        if gradients is not None:
            model = torch.nn.ParameterList([torch.nn.Parameter(torch.empty(2, device=gradients))])
            kept = world.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model)
            assert kept.question is not None
        assert compat.join(*asked) == 1
    assert world.given == [expected]


@pytest.mark.parametrize(("gpu", "expected"), [(None, -1), (0, 0), (3, 3)])
def test_horovod_is_told_where_to_make_them(monkeypatch, gpu, expected):
    horovod = pytest.importorskip("hvdtrain.world.horovod", exc_type=ImportError)
    given = []
    monkeypatch.setattr(horovod.hvd, "join", lambda device=-1: given.append(device) or 5)
    world = object.__new__(horovod.HorovodWorld)  # no rank was started
    world.progress = Progress()
    assert world.answer_with_zeros(gpu) == 5
    assert given == [expected]


def test_what_ranks_gather_is_on_their_own_gpus():
    """A pickle of a tensor names the sender's GPU: this rank would begin to use it, or has none of that number."""
    with FakeTensorMode():
        value = {"loss": torch.empty(2, device="cuda:3"), "more": [torch.empty(3), 5], "weight": "as it is"}
        sent = without_gpus(value)
        assert [tensor.device.type for tensor in sent.tensors] == ["cpu", "cpu"]
        found = on_own_gpu(sent, torch.device("cuda", 1))
    assert (found["loss"].device, found["loss"].shape) == (torch.device("cuda", 1), (2,))
    assert found["more"][0].device.type == "cpu"
    assert (found["more"][1], found["weight"]) == (5, "as it is")


@pytest.mark.parametrize("value", [{"a": torch.ones(2)}, 7, lambda: None], ids=["in host memory", "a number", "code"])
def test_what_is_on_no_gpu_is_sent_as_it_is(value):
    assert without_gpus(value) is value
    assert on_own_gpu(value, torch.device("cuda", 1)) is value
