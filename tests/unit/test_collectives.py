"""What ranks exchange in loops of the user's own: on ranks that are threads, and on one."""

import pytest
import torch
from thread_world import run_ranks
from torch.utils.data import DataLoader, TensorDataset

import hvdtrain
from hvdtrain.errors import UsageError
from hvdtrain.world import RankSampler, SoloWorld, keep_per_rank

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
