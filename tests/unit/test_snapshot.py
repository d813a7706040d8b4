"""Saving beside a GPU that goes on: by torch's streams for CPUs, which do nothing, in the place of a GPU's."""

import dataclasses
import threading
import weakref

import pytest
import torch
from test_parts import job_in, newest, trained_and_saved
from test_sharded import NAMES, settings, settings_class
from thread_world import run_ranks
from torch.utils._python_dispatch import TorchDispatchMode

from hvdtrain.process.launch import Launch
from hvdtrain.rundir.checkpoint import load_checkpoint
from hvdtrain.rundir.joined import check_parts, joined
from hvdtrain.trainer import saver as saver_module
from hvdtrain.trainer import strategy, train_step
from hvdtrain.trainer.component import nested_tensors
from hvdtrain.trainer.saver import Saver
from hvdtrain.trainer.shared_copies import shared_out
from hvdtrain.trainer.snapshot import Snapshot
from hvdtrain.trainer.state import start_training
from hvdtrain.world import SoloWorld

CPU = torch.device("cpu")


class Streams:
    """What torch's streams are asked for, in order."""

    def __init__(self, monkeypatch):
        self.said, self._numbers = [], {}
        for kind, names in {
            torch.cpu.Stream: ["wait_stream"],
            torch.cpu.Event: ["record", "wait", "synchronize"],
        }.items():
            for name in names:
                monkeypatch.setattr(kind, name, self._noting(name))

    def _noting(self, name):
        def note(item, *others):
            self.say(name, item)

        return note

    def say(self, word, item=None):
        stream = "main" if torch.cpu.current_stream() is torch.cpu._default_cpu_stream else "side"
        number = "" if item is None else f" {self._numbers.setdefault(item, len(self._numbers))}"
        self.said.append(f"{stream}: {word}{number}")


class NoteCopies(TorchDispatchMode):
    """Notes which tensors are copied."""

    def __init__(self, streams, names):
        super().__init__()
        self.streams, self.names = streams, names

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default:
            self.streams.say(f"copy {self.names[args[1].data_ptr()]}")
        return func(*args, **(kwargs or {}))


def test_what_rests_is_copied_last_and_waited_for_when_it_is_to_change(monkeypatch):
    streams = Streams(monkeypatch)
    weight, buffer = torch.arange(6.0).view(2, 3), torch.arange(4)
    with NoteCopies(streams, {weight.data_ptr(): "weight", buffer.data_ptr(): "buffer"}):
        snapshot = Snapshot(CPU)
        snapshot.begin()
        copies = [snapshot.take(weight.T), snapshot.take(buffer)]
        assert streams.said == []
        snapshot.start([weight])
        begun = ["main: wait_stream 0", "side: copy buffer", "side: record 1", "side: copy weight", "side: record 2"]
        assert streams.said == [*begun, "main: wait 1"]
        snapshot.hold()
        snapshot.hold()
        assert streams.said[6:] == ["main: wait 2"]
        snapshot.arrive()
        assert streams.said[7:] == ["main: synchronize 2"]
    assert torch.equal(copies[0], weight.T)
    assert copies[0].is_contiguous()  # as without
    assert torch.equal(copies[1], buffer)


def test_its_memory_is_used_again_and_what_was_copied_is_let_go():
    snapshot = Snapshot(CPU)
    place, sources = {}, []
    for turn in range(2):
        snapshot.begin()
        tensors = {
            "a": torch.full((3,), float(turn)),
            "b": torch.zeros(3, dtype=torch.int64),
            "c": torch.ones(2 + turn),
        }
        copies = {name: snapshot.take(tensor) for name, tensor in tensors.items()}
        snapshot.start()
        snapshot.arrive()
        assert all(torch.equal(copies[name], tensor) for name, tensor in tensors.items())
        sources.append(weakref.ref(tensors["a"].untyped_storage()))
        place[turn] = {name: copy.data_ptr() for name, copy in copies.items()}
        del tensors
    assert [place[0][name] == place[1][name] for name in "ab"] == [True, True]
    assert copies["c"].shape == (3,)
    assert sources[1]() is None


def alone():
    return SoloWorld(CPU, Launch("none"))


def test_a_run_saved_so_is_the_same_and_weights_change_after_they_were_copied(tmp_path, monkeypatch):
    plain = trained_and_saved(alone(), tmp_path / "plain", settings(False), saves=2)
    expected = load_checkpoint(newest(tmp_path / "plain"))
    streams = Streams(monkeypatch)
    job = job_in(alone(), tmp_path / "beside", settings(False))
    training = start_training(job)
    training.weights_rest = True
    with Saver(job) as saver:
        saver._snapshot = Snapshot(CPU)
        train_step(job, training)
        saver.save(training, {}, beside=True)
        waits = [said for said in streams.said if said.startswith("main: wait")]
        assert len(waits) == 2  # for the stream, and for what a step may change at any time
        weights, seen = [p.detach().clone() for p in training.model.parameters()], []
        monkeypatch.setattr(
            torch.cpu.Event,
            "wait",
            lambda event: seen.append(all(map(torch.equal, weights, training.model.parameters()))),
        )
        train_step(job, training)
        assert seen == [True]  # waited for once, before the update
        saver.save(training, {}, beside=True)
        saver.finish()
    found = load_checkpoint(newest(tmp_path / "beside"))
    assert found.weights.keys() == expected.weights.keys()
    assert all(torch.equal(found.weights[name], value) for name, value in expected.weights.items())
    assert nested_tensors(found.state).keys() == nested_tensors(expected.state).keys()
    for name, value in nested_tensors(expected.state).items():
        assert torch.equal(nested_tensors(found.state)[name], value), name
    assert plain[0].config == job.config


@pytest.mark.parametrize("beside", [True, False])
def test_what_may_change_at_any_time_is_waited_for_at_once(tmp_path, monkeypatch, beside):
    """A caller that promises nothing, and a model whose forward pass is not known to leave its weights alone."""
    job = job_in(alone(), tmp_path, settings(False))
    training = start_training(job)
    training.weights_rest = not beside
    with Saver(job) as saver:
        saver._snapshot = Snapshot(CPU)
        saver.save(training, {}, beside=beside)
        assert training.being_copied is None
        assert saver._snapshot._is_held


def test_the_thread_that_writes_says_which_gpu_it_is_about_before_it_asks(tmp_path, monkeypatch):
    """A new thread is on GPU 0, of which the process would take memory, whichever its own is."""
    said = []

    def note(what):
        return lambda *given: said.append((what, threading.current_thread().name, *given[:1]))

    monkeypatch.setattr(torch.cpu, "set_device", note("device"))
    monkeypatch.setattr(torch.cpu.Event, "synchronize", note("event"))
    job = job_in(alone(), tmp_path, settings(False))
    with Saver(job) as saver:
        saver._snapshot = Snapshot(CPU)
        saver.save(start_training(job), {})
    assert [word[:2] for word in said] == [("device", "hvdtrain-save"), ("event", "hvdtrain-save")]
    assert said[0][2] == CPU


def test_an_error_of_the_copy_is_a_save_that_failed(tmp_path, monkeypatch):
    job = job_in(alone(), tmp_path, settings(False))
    training = start_training(job)

    def fail(event):
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(torch.cpu.Event, "synchronize", fail)
    with Saver(job) as saver:
        saver._snapshot = Snapshot(CPU)
        saver.save(training, {})
        saver._wait_for_all()
        assert saver.metrics()["checkpoint/failed"] == 1
    assert "CUDA error" in job.log.lines[-1]


@pytest.mark.parametrize("name", NAMES)
def test_a_run_goes_on_bitwise_whatever_order_its_weights_lie_in(name, tmp_path):
    """A convolution lies channels last, what is saved in its logical order: fused kernels go by memory."""
    config = settings(False, name, optim={"momentum": 0.9} if name == "sgd" else {})
    trained_and_saved(alone(), tmp_path / "run", config)
    _, ended = trained_and_saved(alone(), tmp_path / "run", config, saves=0)
    _, straight = trained_and_saved(alone(), tmp_path / "straight", config, steps=4, saves=0)
    for a, b in zip(ended.model.parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_shares_of_an_optimizers_state_put_together_are_the_state(name, tmp_path):
    optim = {"momentum": 0.9} if name == "sgd" else {}
    job = job_in(alone(), tmp_path, settings(False, name, optim=optim))
    training = start_training(job)
    train_step(job, training)
    whole = training.optimizer.state_dict()
    shares = [shared_out(whole, rank, 3, 10_000) for rank in range(3)]
    parts = [{"rank": i, "step": 1, "optimizer": part, "components": {}} for i, (_, part) in enumerate(shares)]
    state = {"optimizer": shares[0][0], "components": {}}
    check_parts(state, parts, 1)
    found = joined(state, parts)["optimizer"]
    assert found["param_groups"] == whole["param_groups"]
    assert found["state"].keys() == {number for number, entries in whole["state"].items() if entries}
    wholes, founds = (nested_tensors(value["state"]) for value in (whole, found))
    assert wholes.keys() == founds.keys()
    assert all(torch.equal(founds[key], value) for key, value in wholes.items())
    kept = [nested_tensors([own["entries"] for own in part.values()]) for _, part in shares]
    sizes = [sum(tensor.nbytes for tensor in tensors.values()) for tensors in kept]
    assert sum(sizes) == sum(tensor.nbytes for tensor in wholes.values())
    if len(whole["state"]) > 2:
        assert sizes[0] <= min(sizes[1:])  # it has the weights besides


def test_ranks_with_gpus_share_a_save_and_go_on_from_it(tmp_path, monkeypatch):
    config = settings(False)
    run_ranks(2, lambda world: trained_and_saved(world, tmp_path / "one", config))
    monkeypatch.setattr(strategy.EveryStep, "shares_copies", lambda self, world: True)
    monkeypatch.setattr("hvdtrain.trainer.saved_state._SHARED_BYTES", 1)
    monkeypatch.setattr("hvdtrain.trainer.saved_state._SMALL_BYTES", 1 << 10)
    run_ranks(2, lambda world: trained_and_saved(world, tmp_path / "two", config))
    one, two = (load_checkpoint(newest(tmp_path / name)) for name in ("one", "two"))
    names = sorted(path.name for path in newest(tmp_path / "two").iterdir())
    assert names == [*("manifest.json", "model.safetensors", "state-rank-000.pt", "state-rank-001.pt", "state.pt")]
    ours, theirs = nested_tensors(two.state), nested_tensors(one.state)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())
    assert two.state["optimizer"]["param_groups"] == one.state["optimizer"]["param_groups"]
    ended = run_ranks(2, lambda world: trained_and_saved(world, tmp_path / "two", config, saves=0)[1])
    straight = run_ranks(1, lambda world: trained_and_saved(world, tmp_path / "three", config, steps=4)[1])
    for a, b in zip(ended[1].model.parameters(), straight[0].model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_goes_on_sends_its_state_once_and_in_place(name, tmp_path):
    config = settings(False, name, optim={"momentum": 0.9} if name == "sgd" else {})
    config = dataclasses.replace(config, optim=settings_class(name)(**dataclasses.asdict(config.optim)))
    run_ranks(2, lambda world: trained_and_saved(world, tmp_path, config))

    def go_on(world):
        pickled = []
        whole = world.broadcast_pickled

        def broadcast_pickled(value, name, root):
            found = whole(value, name, root)
            pickled.append((name, sum(tensor.nbytes for tensor in nested_tensors(found).values())))
            return found

        world.broadcast_pickled = broadcast_pickled
        training = start_training(job_in(world, tmp_path, config))
        sent = [name for name in world.sent if name.startswith("optimizer.state.")]
        return training.optimizer.state_dict(), sent, dict(pickled)

    (zero, sent, _), (one, others, pickled) = run_ranks(2, go_on)
    assert sent == others
    assert len(set(sent)) == len(sent)
    ours, theirs = nested_tensors(zero["state"]), nested_tensors(one["state"])
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]), key
        assert (value.dtype, value.stride()) == (theirs[key].dtype, theirs[key].stride())
    assert one["param_groups"] == zero["param_groups"]
    assert "resume.optimizer" not in pickled
    if name == "adamw":
        assert len(sent) == 2 * len(one["state"]) - 2  # two moments each, but of what has no dimensions
        assert pickled["optimizer"] == sum(value.nbytes for value in ours.values() if value.dim() == 0)


def test_a_save_on_a_cpu_has_no_stream(tmp_path):
    with Saver(job_in(alone(), tmp_path, settings(False))) as saver:
        assert saver._snapshot is None
        assert saver._copy(torch.ones(2)).tolist() == [1, 1]
    assert saver_module.to_host(torch.ones(2)).tolist() == [1, 1]
