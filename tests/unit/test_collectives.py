"""What ranks exchange in loops of the user's own: on ranks that are threads, and on one."""

import argparse
import collections
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from thread_world import run_ranks
from torch.utils.data import DataLoader, TensorDataset

import hvdtrain
from hvdtrain.errors import UsageError
from hvdtrain.world import Asking, RankSampler, SoloWorld, keep_per_rank, means
from hvdtrain.world.question import ask_with_gradients

TYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.int8, torch.bool, torch.complex64]


@pytest.fixture
def solo():
    return SoloWorld(torch.device("cpu"), hvdtrain.process.launch.Launch("none"))


def test_names_may_be_left_out():
    """Also where ranks have unequal numbers of collectives with names between them."""

    def work(world):
        for _ in range(world.rank):  # what only some ranks do does not count
            world.start_all_reduce_(torch.ones(1), "sum", f"mine.{world.rank}")
        total = world.all_reduce(torch.tensor([1.0 + world.rank]), "sum")
        objects = world.all_gather_object({"rank": world.rank})
        again = world.all_reduce(torch.tensor([10.0 * world.rank]), "max")
        world.barrier()
        return total.item(), [item["rank"] for item in objects], again.item()

    assert run_ranks(3, work) == [(6.0, [0, 1, 2], 20.0)] * 3


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_parts_of_every_type(dtype):
    def part(rank, rows):
        return ((torch.arange(2 * rows).view(rows, 2) + rank) % 2).to(dtype)

    def work(world):
        gathered = world.all_gather(part(world.rank, world.rank + 1))
        swapped = world.all_to_all(part(world.rank, 2 * world.size))
        sent = world.broadcast(part(world.rank, 3).t(), root=2)
        return gathered, swapped, sent

    for rank, (gathered, swapped, sent) in enumerate(run_ranks(3, work)):
        assert torch.equal(gathered, torch.cat([part(other, other + 1) for other in range(3)]))
        expected = torch.cat([part(other, 6)[2 * rank : 2 * rank + 2] for other in range(3)])
        assert torch.equal(swapped, expected)
        assert torch.equal(sent, part(2, 3).t())


@pytest.mark.parametrize("op", ["sum", "mean", "min", "max"])
def test_reduce_scatter(op):
    def whole(rank):
        return torch.arange(12, dtype=torch.float64).view(6, 2) * (rank + 1)

    results = run_ranks(3, lambda world: world.reduce_scatter(whole(world.rank), op))
    stacked = torch.stack([whole(rank) for rank in range(3)])
    expected = {"sum": stacked.sum(0), "mean": stacked.mean(0), "min": stacked.amin(0), "max": stacked.amax(0)}[op]
    assert torch.equal(torch.cat(results), expected)


def test_what_cannot_be_cut_is_refused(solo):
    def work(world):
        with pytest.raises(UsageError, match="cannot be cut into 3 equal parts"):
            world.reduce_scatter(torch.zeros(4, 2))
        with pytest.raises(UsageError, match="cannot be cut"):
            world.all_to_all(torch.tensor(1.0))
        with pytest.raises(UsageError, match="no dimension"):
            world.all_gather(torch.tensor(1.0))
        with pytest.raises(UsageError, match="there is no rank 3: ranks are 0 to 2"):
            world.broadcast(torch.zeros(1), root=3)

    run_ranks(3, work)
    with pytest.raises(UsageError, match="there is no rank 1"):
        solo.broadcast_object("x", root=1)


def test_plain_numbers_stay_plain(solo):
    def work(world):
        return world.all_reduce(world.rank + 1), world.all_reduce(world.rank + 1, "sum"), world.all_reduce(0.5, "max")

    for mean, total, largest in run_ranks(2, work):
        assert (mean, total, largest) == (1.5, 3, 0.5)
        assert isinstance(total, int)
    assert solo.all_reduce(3.0) == 3.0


def test_what_ranks_ask_each_other_travels_in_host_memory():
    """A GPU would have to be waited for: here, whoever looks at the device, or at torch's default one, fails."""

    def work(world):
        world.device = torch.device("meta")
        with world.device:
            world.barrier()
            numbers = world.all_reduce(2.0, "sum"), world.all_reduce(world.rank, "max"), world.all_reduce(True, "min")
            ask = Asking(world, SimpleNamespace(question=None))
            ask.ask(world.rank == 1)
            question = ask_with_gradients(world, SimpleNamespace(question=None), False, "question")()
            batches = list(world.join([1, 2] if world.rank else [1]))
            assert world.agrees("alike", "agrees")
            return numbers, ask.answer(), question, batches

    zero, one = run_ranks(2, work)
    assert zero[:3] == one[:3] == ((4.0, 1, True), True, False)
    assert (zero[3], one[3]) == ([1, None], [1, 2])


def test_many_tensors_are_averaged_some_at_a_time(monkeypatch):
    monkeypatch.setattr(means, "_NUMBERS", 10)

    def work(world):
        tensors = [torch.full((size,), float(world.rank)) for size in (4, 5, 3, 20, 1)]
        world.average_tensors(tensors, "mean")
        return [tensor.tolist() for tensor in tensors], world.sent

    for averaged, sent in run_ranks(2, work):
        assert averaged == [[0.5] * size for size in (4, 5, 3, 20, 1)]
        assert sent == ["mean.mean", "mean.1.mean", "mean.2.mean", "mean.3.mean"]


NUMBERS = [
    True, 3, 2.5, 1 + 2j, np.float32(2.5), np.float64(2.5), np.int64(3), np.int8(3), np.bool_(True), np.complex64(2j),
]  # fmt: skip
NO_NUMBERS = [None, "3", [1.0], (1, 2), {"a": 1}, np.zeros(2), np.zeros(1), object(), torch.float32]
TENSORS_TAKEN = {
    "all_reduce": lambda world, value: world.all_reduce(value, "sum"),
    "broadcast": lambda world, value: world.broadcast(value),
    "all_gather": lambda world, value: world.all_gather(value),
    "all_to_all": lambda world, value: world.all_to_all(value),
    "reduce_scatter": lambda world, value: world.reduce_scatter(value),
    "broadcast_tensors": lambda world, value: world.broadcast_tensors({"x": value}, "x"),
}
ODD_TENSORS = {
    "sparse": torch.eye(2).to_sparse(),
    "sparse rows": torch.eye(2).to_sparse_csr(),
    "meta": torch.zeros(2, device="meta"),
    "overlapping": torch.zeros(3).as_strided((2, 2), (1, 1)),
}
TENSORS = {
    "of a graph": torch.ones(2, 2, requires_grad=True) * 2,
    "conjugate": torch.ones(2, 2, dtype=torch.complex64).mul(2j).conj(),
    "transposed": torch.arange(4.0).view(2, 2).t(),
    "expanded": torch.ones(1, 2).expand(2, 2),
    "part": torch.arange(16.0).view(4, 4)[::2, ::2],
    "nothing": torch.zeros(0, 3),
    "own class": torch.nn.Parameter(torch.ones(2, 2)),
    "fp64": torch.ones(2, 2, dtype=torch.float64) / 3,
}


@pytest.mark.parametrize("value", NUMBERS, ids=repr)
@pytest.mark.parametrize("op", ["sum", "mean"])
def test_numbers_of_every_kind(value, op, solo):
    plain = value.item() if isinstance(value, np.generic) else value
    totals = [solo.all_reduce(value, op), *run_ranks(2, lambda world: world.all_reduce(value, op))]
    assert totals == [plain, *[2 * plain if op == "sum" else plain] * 2]
    assert {type(total) for total in totals} <= {int, float, complex}


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
@pytest.mark.parametrize("call", TENSORS_TAKEN)
def test_what_is_neither_number_nor_tensor(solo, call, value):
    with pytest.raises(UsageError, match="is no tensor but of type"):
        TENSORS_TAKEN[call](solo, value)


@pytest.mark.parametrize("kind", ODD_TENSORS)
@pytest.mark.parametrize("call", TENSORS_TAKEN)
def test_tensors_that_cannot_travel(solo, call, kind):
    if kind == "overlapping" and call != "broadcast_tensors":
        pytest.skip("a copy of it does not overlap")
    with pytest.raises(UsageError, match=r"cannot travel|device meta|overlaps itself"):
        TENSORS_TAKEN[call](solo, ODD_TENSORS[kind])


@pytest.mark.parametrize("kind", TENSORS)
@pytest.mark.parametrize("call", [call for call in TENSORS_TAKEN if call != "broadcast_tensors"])
def test_tensors_of_every_form(call, kind):
    tensor = TENSORS[kind]
    first, second = run_ranks(2, lambda world: TENSORS_TAKEN[call](world, tensor))
    expected = {
        "all_reduce": 2 * tensor, "broadcast": tensor, "all_gather": torch.cat((tensor, tensor)),
        "all_to_all": torch.cat((tensor.chunk(2)[0],) * 2) if tensor.numel() else tensor,
        "reduce_scatter": 2 * tensor.chunk(2)[0],
    }[call]  # fmt: skip
    assert torch.equal(first, expected.detach().resolve_conj())
    assert not first.requires_grad
    assert second.shape == first.shape


@pytest.mark.parametrize("op", ["average", "avg", "SUM", None, 3, "adasum"])
def test_reductions_that_there_are_not(solo, op):
    for value in (torch.ones(2), 3.0, True):
        with pytest.raises(UsageError, match="give sum, mean, min or max"):
            solo.all_reduce(value, op)
    with pytest.raises(UsageError, match="give sum, mean, min or max"):
        solo.reduce_scatter(torch.ones(2), op)


def test_numbers_that_are_too_large(solo):
    assert solo.all_reduce(2**40, "sum") == 2**40
    for op in ("sum", "mean"):
        with pytest.raises(UsageError, match="more than 64 bits"):
            solo.all_reduce(2**2000, op)


@pytest.mark.parametrize("root", ["0", None, 0.5, -1, 1])
def test_roots_that_are_no_ranks(solo, root):
    for call in (solo.broadcast, solo.broadcast_object):
        with pytest.raises(UsageError, match="there is no rank"):
            call(torch.zeros(1), root=root)


def test_ranks_whose_data_ends_earlier():
    """The mean over all is what one process would take over the samples of all ranks."""
    batches = {0: [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], 1: [[7.0, 8.0]]}

    def line():  # not from a seed: ranks that are threads share torch's generator
        layer = torch.nn.Linear(1, 1).double()
        torch.nn.init.constant_(layer.weight, 0.5)
        torch.nn.init.constant_(layer.bias, 0.25)
        return layer

    def work(world):
        layer = line()
        optimizer = world.wrap(torch.optim.SGD(layer.parameters(), lr=0.01), layer)
        seen = 0
        for batch in world.join(batches[world.rank]):
            optimizer.zero_grad()
            if batch is not None:
                seen += 1
                layer(torch.tensor(batch, dtype=torch.float64).view(-1, 1)).sum().backward()
            optimizer.step()
        return seen, layer.weight.item()

    (first, weight), (second, other) = run_ranks(2, work)
    assert (first, second, weight) == (3, 1, other)
    layer = line()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    for step in range(3):
        optimizer.zero_grad()
        numbers = [number for own in batches.values() for batch in own[step : step + 1] for number in batch]
        (layer(torch.tensor(numbers, dtype=torch.float64).view(-1, 1)).sum() / 2).backward()
        optimizer.step()
    assert weight == pytest.approx(layer.weight.item(), abs=1e-12)


@pytest.mark.parametrize("shuffle", [True, False])
def test_each_sample_is_seen_once_by_one_rank(shuffle):
    samplers = [RankSampler(11, rank, 3, shuffle=shuffle, seed=5) for rank in range(3)]
    epochs = []
    for _ in range(3):
        parts = [list(sampler) for sampler in samplers]
        assert {len(part) for part in parts} == {3} == {len(sampler) for sampler in samplers}
        assert len({place for part in parts for place in part}) == 9
        epochs.append(parts)
    assert (epochs[0] != epochs[1]) == shuffle
    fresh = RankSampler(11, 1, 3, shuffle=shuffle, seed=5)
    fresh.load_state_dict({"epoch": 2})
    assert list(fresh) == epochs[2][1]
    assert fresh.state_dict() == {"epoch": 3}
    fresh.set_epoch(0)
    assert list(fresh) == epochs[0][1]
    with pytest.raises(UsageError, match="2 samples cannot be shared by 3 ranks"):
        RankSampler(2, 0, 3)


def test_a_data_loader_takes_the_sampler(solo):
    data = TensorDataset(torch.arange(6.0))
    loader = DataLoader(data, batch_size=2, sampler=solo.sampler(len(data), shuffle=False))
    assert [batch.tolist() for (batch,) in loader] == [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]


def test_state_is_written_by_one_and_read_by_all(tmp_path):
    path = tmp_path / "state.pt"

    def work(world):
        with pytest.raises(UsageError, match="is no file"):
            world.load(path)
        world.save({"step": 3, "weights": torch.full((2,), float(world.rank))}, path)
        return world.load(path)

    for state in run_ranks(2, work):
        assert state["step"] == 3
        assert state["weights"].tolist() == [0.0, 0.0]
    path.write_bytes(b"something else")

    def broken(world):
        with pytest.raises(UsageError, match="cannot be read as tensors and plain values"):
            world.load(path)
        with pytest.raises(UsageError, match="cannot be written"):
            world.save({}, tmp_path / "no" / "such" / "folder")

    run_ranks(2, broken)
    assert [item.name for item in tmp_path.iterdir()] == ["state.pt"]


def test_what_could_not_be_read_again_is_not_written(solo, tmp_path):
    path = tmp_path / "state.pt"
    good = {"best": np.float64(0.5), "steps": (np.int64(3), [np.bool_(True)]), "order": collections.OrderedDict(a=1)}
    solo.save(good, path)
    state = solo.load(path)
    assert state == {"best": 0.5, "steps": (3, [True]), "order": {"a": 1}}
    assert type(state["best"]) is float
    for odd, place in {
        "object": (argparse.Namespace(lr=1), r"state\['part'\]\[1\] is of type argparse\.Namespace"),
        "array": (np.zeros(2), r"state\['part'\]\[1\] is of type numpy\.ndarray"),
        "function": (lambda: 0, r"state\['part'\]\[1\] is of type builtins\.function"),
        "path": (path, r"state\['part'\]\[1\] is of type pathlib"),
        "model": (torch.nn.Linear(1, 1), r"state\['part'\]\[1\] is of type torch"),
    }.values():
        with pytest.raises(UsageError, match=f"is not written, as load\\(\\) could not read it: {place}"):
            solo.save({"part": [1, odd]}, path)
        assert solo.load(path) == state
    with pytest.raises(UsageError, match="takes a dictionary"):
        solo.save(torch.nn.Linear(1, 1), path)
    assert [item.name for item in tmp_path.iterdir()] == ["state.pt"]


def test_buffers_become_equal():
    def work(world):
        module = torch.nn.BatchNorm1d(2)
        module.register_buffer("queue", torch.zeros(1))
        keep_per_rank(module, "queue")
        module.running_mean.fill_(world.rank)
        module.num_batches_tracked.fill_(world.rank)
        module.queue.fill_(world.rank)
        world.average_buffers(module)
        return module.running_mean.tolist(), module.num_batches_tracked.item(), module.queue.item()

    assert run_ranks(3, work) == [([1.0, 1.0], 2, float(rank)) for rank in range(3)]


def test_an_optimizer_of_another_rank():
    def work(world):
        layer = torch.nn.Linear(1, 1)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1 * (world.rank + 1), momentum=0.9)
        world.broadcast_state(layer, optimizer, root=1)
        return optimizer.param_groups[0]["lr"]

    assert run_ranks(2, work) == [0.2, 0.2]


def test_agreement_sends_two_numbers_and_no_values():
    """What all ranks have alike is not gathered: it would be N values on each of N ranks."""

    def work(world):
        alike = world.agrees({"steps": 5, "text": "x" * 10_000}, "alike")
        differs = world.agrees({"steps": 5 + (world.rank == 2)}, "differs")
        value = world.together(lambda: world.rank, "fine")
        return alike, differs, value, world.handed_bytes["alike"], list(world.sent)

    for rank, (alike, differs, value, handed, sent) in enumerate(run_ranks(3, work)):
        assert (alike, differs, value, handed) == (True, False, rank, 16)
        assert sent == ["alike", "differs", "together.fine.any"]
    assert SoloWorld(torch.device("cpu"), hvdtrain.process.launch.Launch("none")).agrees(1, "one")


def test_an_error_of_one_rank_is_everybodys():
    def work(world):
        def action():
            if world.rank == 1:
                raise UsageError("no such file")

        with pytest.raises(UsageError, match="on rank 1: no such file") as caught:
            world.together(action, "read")
        return caught.value.is_on_all_ranks

    assert run_ranks(3, work) == [True] * 3
