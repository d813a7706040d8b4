"""Checkpoints that all ranks write: a part each, one manifest, whole or not there, and read at any number of ranks."""

import contextlib
import copy
import dataclasses
import itertools
import os
import shutil
import threading

import pytest
import torch
from test_checkpoint import fail_with, reseal
from test_sharded import NAMES, same, settings, task_of, weights_of
from thread_world import run_ranks
from torch import nn

from hvdtrain.data.dataset import TensorSamples
from hvdtrain.errors import CheckpointError
from hvdtrain.rundir import parts
from hvdtrain.rundir.checkpoint import load_checkpoint
from hvdtrain.rundir.checkpoints import Checkpoints
from hvdtrain.rundir.directory import RunDirectory
from hvdtrain.rundir.log import MetricLog
from hvdtrain.settings import CommConfig, TrainConfig
from hvdtrain.trainer import Task, settle, train_step
from hvdtrain.trainer.component import Component
from hvdtrain.trainer.saved_state import handed_out
from hvdtrain.trainer.saver import Saver
from hvdtrain.trainer.state import start_training
from hvdtrain.trainer.unfreezing import GradualUnfreezing


class Said(MetricLog):
    """Keeps what is said."""

    def __init__(self):
        super().__init__(None, [])
        self.lines = []

    def say(self, text):
        self.lines.append(text)


def job_in(world, folder, config, task=None):
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=20))
    task = task or task_of()
    task = dataclasses.replace(task, model=copy.deepcopy(task.model))  # each rank its own
    return settle(task, config, world, RunDirectory(folder), Said())


def trained_and_saved(world, folder, config, task=None, steps=2, saves=1):
    """Take some steps from where the run stands, and save after each of the last few; returns job and training."""
    job = job_in(world, folder, config, task)
    training = start_training(job)
    with Saver(job) as saver:
        for step in range(steps):
            train_step(job, training)
            if steps - step <= saves:
                saver.save(training, {})
        saver.finish()
    return job, training


def newest(folder):
    return max(Checkpoints(folder / "checkpoints").by_step().items())[1]


def files(path):
    return sorted(file.name for file in path.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_the_parts_of_every_optimizer_are_its_whole_state(tmp_path, name):
    """Clipped, in two groups, with a convolution that does not lie in its logical order, and a moving average."""
    optim = {"momentum": 0.9} if name == "sgd" else {}

    def work(world):
        job, training = trained_and_saved(world, tmp_path, settings(True, name, {"ema": 0.5}, optim=optim))
        return job.strategy.optimizer_state(world, training)

    whole, *_ = run_ranks(3, work)
    path = newest(tmp_path)
    assert files(path) == sorted(FILES)
    saved = load_checkpoint(path).state
    assert same(saved["optimizer"], whole)
    assert len(saved["components"]["window"]) == 3


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_run_goes_on_at_any_number_of_ranks_with_sharding_and_without(tmp_path, name):
    """4 ranks, then 3, then 1, then 2, then 2 whole, and sharded again: in all as one rank alone."""
    stations = ((4, True), (3, True), (1, False), (2, True), (2, False), (3, True))
    train = {"global_batch_size": 12, "max_grad_norm": 0.5, "ema": 0.5}

    def work(shard):
        return lambda world: weights_of(trained_and_saved(world, tmp_path / "run", settings(shard, name, train))[1])

    for size, shard in stations:
        weights, *_ = run_ranks(size, work(shard))
        assert ("state-rank-000.pt" in files(newest(tmp_path / "run"))) == shard
    alone = settings(False, name, train)
    steps = 2 * len(stations)
    expected, *_ = run_ranks(
        1, lambda world: weights_of(trained_and_saved(world, tmp_path / "alone", alone, steps=steps)[1])
    )
    assert max((tensor - expected[key]).abs().max().item() for key, tensor in weights.items()) < 1e-12


def test_on_the_same_ranks_it_goes_on_bitwise(tmp_path):
    """Also with layers that are unfrozen meanwhile."""
    task = lambda: task_of(callbacks=[GradualUnfreezing({"2": 1, "0": 3})])  # noqa: E731

    def work(folder, steps):
        return lambda world: weights_of(trained_and_saved(world, folder, settings(True), task(), steps)[1])

    whole, *_ = run_ranks(3, work(tmp_path / "whole", 6))
    for steps in (2, 4):
        parts_of, *_ = run_ranks(3, work(tmp_path / "parts", steps))
    assert all(torch.equal(tensor, parts_of[name]) for name, tensor in whole.items())


def wide():
    """A model whose gradients are compressed, and a task of its own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 600), nn.Tanh(), nn.Linear(600, 600), nn.Tanh(), nn.Linear(600, 1))
    x = torch.randn(24, 8, generator=torch.Generator().manual_seed(1))
    data = TensorSamples(x, x.sin().sum(1, keepdim=True))
    losses = {"loss_sums": lambda model, batch: {"loss": (model(batch[0]) - batch[1]).square().sum()}}
    return Task(model=model, train_data=data, val_data=data, **losses)


WAYS = {
    "topk": {"compression": "topk:0.1"},
    "powersgd": {"compression": "powersgd:2"},
    "int8": {"compression": "int8"},
    "local": {"sync": "local", "period": 3},
    "local, int8, nesterov": {"sync": "local", "period": 2, "outer": "nesterov", "compression": "int8"},
    "local, fragments": {"sync": "local", "period": 3, "fragments": 2, "overlap_steps": 1, "compression": "int8"},
}


@pytest.mark.parametrize("way", WAYS)
def test_what_ranks_have_for_themselves_is_written_by_each(tmp_path, way):
    """What a codec remembers, and local updates' optimizers: nothing of it travels, and the run goes on bitwise."""
    train = {"precision": "fp32", "global_batch_size": 12}
    config = settings(False, train=train, comm=CommConfig(**WAYS[way]))

    task = wide()

    def work(folder, steps, sent=None):
        def of_rank(world):
            _, training = trained_and_saved(world, folder, config, task, steps)
            if sent is not None and world.rank == 0:
                sent.extend(name for name in world.sent if name.startswith("save."))
            return {**weights_of(training), **{f"own.{k}": v for k, v in training.model.named_buffers()}}

        return of_rank

    sent = []
    whole = run_ranks(2, work(tmp_path / "whole", 4))
    for steps in (1, 3):
        halves = run_ranks(2, work(tmp_path / "halves", steps, sent))
    for one, other in zip(whole, halves, strict=True):
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert set(sent) == {"save.own", "save.token", "save.seen", "save.receipts", "save.finish"}
    path = newest(tmp_path / "halves")
    assert (path / "state-rank-001.pt").stat().st_size > 1 << 20
    run_ranks(3, work(tmp_path / "halves", 1))  # another number takes what was left over


def test_what_is_small_is_gathered(tmp_path):
    """Metrics of the steps so far are each rank's own too, but no file is made for them."""
    run_ranks(2, lambda world: trained_and_saved(world, tmp_path, settings(False)) and None)
    assert files(newest(tmp_path)) == ["manifest.json", "model.safetensors", "state.pt"]
    assert load_checkpoint(newest(tmp_path)).manifest.format_version == 3


@pytest.fixture(scope="module")
def saved_twice(tmp_path_factory):
    """A sharded run of three ranks with two checkpoints, of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("twice")
    run_ranks(3, lambda world: trained_and_saved(world, folder, settings(True), saves=2) and None)
    return folder


def flip(path, _):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "missing": lambda path, other: path.unlink(),
    "cut": lambda path, other: os.truncate(path, path.stat().st_size - 7),
    "empty": lambda path, other: os.truncate(path, 0),
    "longer": lambda path, other: os.truncate(path, 1 << 42),
    "flipped": flip,
    "of another save": lambda path, other: shutil.copyfile(other, path),
    "a folder": lambda path, other: (path.unlink(), path.mkdir()),
    "a pipe": lambda path, other: (path.unlink(), os.mkfifo(path)),
}
FILES = ["manifest.json", "model.safetensors", "state.pt", *(f"state-rank-00{i}.pt" for i in range(3))]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_each_file_that_is_damaged_is_named_and_the_checkpoint_before_it_is_used(saved_twice, tmp_path, name, damage):
    shutil.copytree(saved_twice / "checkpoints", tmp_path / "checkpoints")
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    path = checkpoints.path_of(2)
    DAMAGES[damage](path / name, checkpoints.path_of(1) / name)
    warnings = []
    assert checkpoints.newest_manifest().step == 1
    assert checkpoints.load_newest(warnings.append).manifest.step == 1
    assert len(warnings) == 1
    assert str(path if name == "manifest.json" and damage == "of another save" else path / name) in warnings[0]
    assert "\n" not in warnings[0]


def test_a_part_that_fits_its_hash_and_no_other_part_is_passed_over(saved_twice, tmp_path):
    """Ranks' parts that have changed places, and one of another step, under a manifest that was sealed anew."""
    for swap in ({"state-rank-000.pt": (2, "state-rank-001.pt")}, {"state-rank-002.pt": (1, "state-rank-002.pt")}):
        shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
        shutil.copytree(saved_twice / "checkpoints", tmp_path / "checkpoints")
        checkpoints = Checkpoints(tmp_path / "checkpoints")
        path, hashes, sizes = checkpoints.path_of(2), {}, {}
        for name, (step, other) in swap.items():
            shutil.copyfile(checkpoints.path_of(step) / other, path / name)
        for name in FILES[1:]:
            hashes[name], sizes[name] = parts.flushed_sha256(path / name), (path / name).stat().st_size
        reseal(path, sha256=hashes, sizes=sizes)
        warnings = []
        assert checkpoints.newest_manifest().step == 1
        assert checkpoints.load_newest(warnings.append).manifest.step == 1
        assert "is not of this rank and step" in warnings[0]


ODD = {
    "a part too few": lambda values: {"sha256": without(values["sha256"]), "sizes": without(values["sizes"])},
    "no sizes": lambda values: {"sizes": ...},
    "another number of ranks": lambda values: {"world_size": 2},
    "a size too few": lambda values: {"sizes": without(values["sizes"])},
    "the older format": lambda values: {"format_version": 3},
    "a size as text": lambda values: {"sizes": {**values["sizes"], "state.pt": "12"}},
    "a file elsewhere": lambda values: {"sha256": {**without(values["sha256"]), "../latest": "0" * 64}},
}


def without(files):
    return {name: value for name, value in files.items() if name != "state-rank-002.pt"}


@pytest.mark.parametrize("odd", ODD)
def test_an_odd_manifest_of_parts_is_passed_over(saved_twice, tmp_path, odd):
    shutil.copytree(saved_twice / "checkpoints", tmp_path / "checkpoints")
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    manifest = dataclasses.asdict(load_checkpoint(checkpoints.path_of(2)).manifest)
    reseal(checkpoints.path_of(2), **ODD[odd](manifest))
    warnings = []
    assert checkpoints.load_newest(warnings.append).manifest.step == 1
    assert "has no good value for" in warnings[0]


def test_killed_at_any_instant_there_is_a_whole_checkpoint(tmp_path, monkeypatch):
    """The folder as it is at each flush and renaming of a save, by any rank, is what a kill there leaves behind."""
    run, lock, found, names = tmp_path / "run", threading.Lock(), [], itertools.count()
    run_ranks(2, lambda world: trained_and_saved(world, run, settings(True), steps=1) and None)
    before = Checkpoints(run / "checkpoints").load_newest(print)
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def seen(action):
        def watched(*arguments, **named):
            result = action(*arguments, **named)
            with lock, contextlib.suppress(FileNotFoundError, shutil.Error):  # the other rank goes on meanwhile
                place = tmp_path / f"killed-{next(names)}"  # a copy that failed leaves its folder behind
                shutil.copytree(run, place)
                found.append(place)
            return result

        return watched

    for name, action in (("fsync", fsync), ("rename", rename), ("replace", replace)):
        monkeypatch.setattr(os, name, seen(action))
    run_ranks(2, lambda world: trained_and_saved(world, run, settings(True)) and None)
    monkeypatch.undo()
    assert len(found) > 10
    steps = []
    for place in found:
        checkpoint = RunDirectory(place).load_newest(fail_with(AssertionError))
        steps.append(checkpoint.manifest.step)
        if checkpoint.manifest.step == 1:
            assert same(checkpoint.state["optimizer"], before.state["optimizer"])
    assert steps == sorted(steps)
    assert set(steps) == {1, 3}


def failing_on(rank, error):
    save = torch.save

    def fail(value, path, *more, **named):
        if getattr(path, "name", "") == f"state-rank-00{rank}.pt":
            raise error
        return save(value, path, *more, **named)

    return fail


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyError("x"), MemoryError(), SystemExit(1)])
def test_a_part_that_cannot_be_written_fails_the_save_and_the_next_one_is_good(tmp_path, monkeypatch, rank, error):
    run_ranks(2, lambda world: trained_and_saved(world, tmp_path, settings(True), steps=1) and None)
    monkeypatch.setattr(parts.torch, "save", failing_on(rank, error))
    with pytest.raises(CheckpointError, match=rf"rank {rank}: .*earlier ones are intact"):
        run_ranks(2, lambda world: trained_and_saved(world, tmp_path, settings(True), steps=1))
    assert files(tmp_path / "checkpoints") == ["latest", "step-00000001"]
    monkeypatch.undo()
    run_ranks(2, lambda world: trained_and_saved(world, tmp_path, settings(True), steps=1) and None)
    assert newest(tmp_path).name == "step-00000002"


def test_a_rank_that_can_leave_no_receipt_keeps_nobody_waiting(tmp_path, monkeypatch):
    """Rank 0 hears of it where the ranks meet next, and a rank that is gone is waited for in vain only so long."""
    monkeypatch.setattr(parts.torch, "save", failing_on(1, OSError(28, "No space left on device")))
    monkeypatch.setattr(parts, "_leave", lambda folder, rank, receipt: None)
    with pytest.raises(CheckpointError, match=r"rank 1: state-rank-001.pt could not be written .*No space left"):
        run_ranks(2, lambda world: trained_and_saved(world, tmp_path, settings(True), steps=1))
    receipts = parts.Receipts(tmp_path, 2)
    receipts.note(0, parts.Receipt())
    receipts.give_up(0.01)
    with pytest.raises(CheckpointError, match="rank 1 did not say that its part is written"):
        receipts.wait()


def test_an_empty_receipt_says_that_there_is_no_part(tmp_path):
    (tmp_path / ".receipt-001").touch()
    receipts = parts.Receipts(tmp_path, 2)
    receipts.note(0, parts.Receipt())
    with pytest.raises(CheckpointError, match="its disk is full"):
        receipts.wait()


def test_memory_that_is_not_there_fails_the_save_on_any_rank(tmp_path, monkeypatch):
    """The copy to host memory fails on one rank; the others have written theirs."""
    from hvdtrain.trainer import saver

    right = saver.storable
    for rank in (0, 1):

        def full(value, where, *more, rank=rank):
            if where == "the state of this rank" and value["rank"] == rank:
                raise MemoryError
            return right(value, where, *more)

        monkeypatch.setattr(saver, "storable", full)
        with pytest.raises(CheckpointError, match="could not be copied to host memory"):
            run_ranks(2, lambda world: trained_and_saved(world, tmp_path, settings(True), steps=1))
    monkeypatch.undo()
    run_ranks(2, lambda world: trained_and_saved(world, tmp_path, settings(True), steps=1) and None)
    assert files(tmp_path / "checkpoints") == ["latest", "step-00000001"]


def test_hosts_that_share_no_directory_gather_and_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "_MARKS_PATIENCE_S", 0.05)
    (tmp_path / "host2" / "checkpoints").mkdir(parents=True)

    def work(world):
        folder = tmp_path / ("host2" if world.rank == 2 else "host1")
        job, training = trained_and_saved(world, folder, settings(True))
        return job.log.lines, job.strategy.optimizer_state(world, training)

    (lines, whole), *_ = run_ranks(3, work)
    assert "checkpoints of rank 2 is another than rank 0's" in lines[0]
    assert files(newest(tmp_path / "host1")) == ["manifest.json", "model.safetensors", "state.pt"]
    assert same(load_checkpoint(newest(tmp_path / "host1")).state["optimizer"], whole)
    assert files(tmp_path / "host2" / "checkpoints") == []
    assert files(tmp_path / "host1" / "checkpoints") == ["latest", "step-00000002"]


def test_what_earlier_attempts_left_is_no_part_of_a_save(tmp_path):
    """A process of a job that was killed may still write: to a folder of its own, which the next save removes."""
    left = tmp_path / "checkpoints" / ".writing-step-00000001-0123abcd-1"
    left.mkdir(parents=True)
    (left / "state-rank-001.pt").write_text("old")
    (left / ".receipt-001").write_text('{"num_bytes": 3, "sha256": "", "error": ""}')
    run_ranks(2, lambda world: trained_and_saved(world, tmp_path, settings(True), steps=1) and None)
    assert files(tmp_path / "checkpoints") == ["latest", "step-00000001"]
    assert load_checkpoint(newest(tmp_path)).manifest.step == 1


def test_settings_of_precision_and_types_are_kept(tmp_path):
    """bf16 weights with a state of their own type, and one rank that keeps nothing of a small model."""
    train = TrainConfig(precision="bf16-true", global_batch_size=12)
    config = dataclasses.replace(settings(True), train=train)

    def work(world):
        job, training = trained_and_saved(world, tmp_path, config)
        return job.strategy.optimizer_state(world, training)

    whole, *_ = run_ranks(4, work)
    assert same(load_checkpoint(newest(tmp_path)).state["optimizer"], whole)


class Everybodys(Component):
    """Alike on all ranks."""

    name = "everybodys"


class Own(Component):
    """Of each rank."""

    name = "own"
    is_replicated = False


@pytest.mark.parametrize("size", [2, 3])
def test_each_rank_is_handed_its_own_state_alone(size):
    """Codecs remember as much as the model on each rank: N of them would fill the memory of all."""

    def work(world):
        of_ranks = [{"x": torch.full((2,), rank)} for rank in range(3)]
        found = {"step": 7, "components": {"own": of_ranks, "everybodys": [1, 2]}} if world.rank == 0 else None
        assert handed_out(world, [], None) is None
        return handed_out(world, [Own(), Everybodys()], found)

    for rank, state in enumerate(run_ranks(size, work)):
        assert (state["step"], state["components"]["everybodys"]) == (7, [1, 2])
        own = state["components"]["own"]
        assert len(own) == 3
        # Another number of ranks goes on from all of them.
        assert [item is not None for item in own] == [size != 3 or other == rank for other in range(3)]
        assert own[rank]["x"].tolist() == [rank, rank]
