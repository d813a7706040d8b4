"""The first collective on GPUs: what hangs ends with a sentence, what NCCL refuses is an error of the launch."""

import subprocess
import sys
import threading

import pytest
import torch
from thread_world import ThreadWorld, run_ranks

from hvdtrain.errors import LaunchError
from hvdtrain.world import start
from hvdtrain.world.first_contact import LIMIT, contact_gpus, ending_after, limit_of

HANGS = """
import threading
from hvdtrain.process.launch import Launch
from hvdtrain.world import SoloWorld
from hvdtrain.world.first_contact import contact_gpus
import torch

class Hanging(SoloWorld):
    def all_reduce(self, *arguments):
        threading.Event().wait()

contact_gpus(Hanging(torch.device("cpu"), Launch("none")), 0.2)
"""


def test_a_hang_ends_with_what_to_set(monkeypatch):
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth7")
    done = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "NCCL has not started within 0.2 s on rank 0" in done.stderr
    assert "NCCL_SOCKET_IFNAME" in done.stderr
    assert "it is eth7 now" in done.stderr


@pytest.mark.parametrize(
    ("given", "seconds"), [({}, 180), ({LIMIT: ""}, 180), ({LIMIT: "600"}, 600), ({LIMIT: "0"}, 0)]
)
def test_the_limit_is_what_the_environment_says(given, seconds):
    assert limit_of(given) == seconds


@pytest.mark.parametrize("given", ["soon", "-1", "nan", "inf"])
def test_a_limit_that_is_none_is_refused(given):
    with pytest.raises(LaunchError, match=f"HOROVOD_NCCL_START_LIMIT={given} is no number of seconds"):
        limit_of({LIMIT: given})


def test_without_a_limit_it_is_waited_for():
    before = {*threading.enumerate()}  # an earlier test's may be about to end
    with ending_after(0, "it hangs"):
        assert {*threading.enumerate()} <= before


def test_ranks_that_reach_each_other_go_on():
    assert run_ranks(2, contact_gpus) == [None, None]


def test_a_refusal_is_an_error_of_the_launch():
    class Refusing(ThreadWorld):
        def all_reduce(self, *arguments):
            raise RuntimeError("ncclCommInitRank failed: invalid usage")

        def has_lost_contact(self, error):
            return True

    def work(world):
        world.__class__ = Refusing
        with pytest.raises(LaunchError, match=r"ncclCommInitRank failed.*one rank per GPU"):
            contact_gpus(world)

    run_ranks(2, work)


def test_a_wrong_sum_is_an_error_of_the_launch():
    class Wrong(ThreadWorld):
        def all_reduce(self, *arguments):
            return torch.tensor([7.0])

    def work(world):
        world.__class__ = Wrong
        with pytest.raises(LaunchError, match="over 2 GPUs gave 7"):
            contact_gpus(world)

    run_ranks(2, work)


def test_ranks_meet_as_soon_as_each_has_its_gpu(monkeypatch):
    """Before anything else is done there: NCCL takes its memory before anybody asks how much is left."""
    worlds, calls = {}, {}

    def work(world):
        here = threading.get_ident()
        worlds[here], calls[here] = world, []
        return start.init().device.index, calls[here]

    monkeypatch.setattr(start, "connect", lambda groups: worlds[threading.get_ident()])
    monkeypatch.setattr(start, "visible_gpus", lambda: ("GPU-a", "GPU-b"))
    monkeypatch.setattr(ThreadWorld, "built_with", {"mpi", "nccl"})
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls[threading.get_ident()].append(device.index))
    monkeypatch.setattr(start, "contact_gpus", lambda world: calls[threading.get_ident()].append("contact"))
    assert run_ranks(2, work) == [(0, [0, "contact"]), (1, [1, "contact"])]


def test_gpus_that_horovod_was_not_built_for_are_refused(monkeypatch):
    """The first collective would end in a traceback on all ranks."""
    worlds = {}

    def work(world):
        worlds[threading.get_ident()] = world
        with pytest.raises(LaunchError, match=r"Horovod is built for CPUs.*CUDA_VISIBLE_DEVICES= \(empty\)"):
            start.init()

    monkeypatch.setattr(start, "connect", lambda groups: worlds[threading.get_ident()])
    monkeypatch.setattr(start, "visible_gpus", lambda: ("GPU-a", "GPU-b"))
    monkeypatch.setattr(ThreadWorld, "built_with", {"mpi", "gloo"})
    run_ranks(2, work)


def test_cuda_that_does_not_start_is_an_error_of_the_launch(monkeypatch):
    def broken(index):
        raise RuntimeError("CUDA error: system not yet initialized\nCompile with TORCH_USE_CUDA_DSA")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", broken)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: broken(0))
    with pytest.raises(LaunchError, match="CUDA does not start on"):
        start.solo_device()
    with pytest.raises(LaunchError, match=r"CUDA does not start on .* \(CUDA error: system not yet initialized"):
        start.visible_gpus()
