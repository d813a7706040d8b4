"""What ranks do together, held against plain MPI or plain arithmetic."""

import gc
import hashlib
import multiprocessing
import os

import pytest
import torch
from torch.utils.data import DataLoader

import hvdtrain
from hvdtrain.errors import ConfigError, DataError, LaunchError, UsageError
from hvdtrain.world import World, handing_over, horovod, scattering
from hvdtrain.world.horovod import HorovodWorld

DTYPES = [torch.float16, torch.float32, torch.float64, torch.uint8, torch.int32, torch.int64]


def digest(tensors):
    """Return a hash of the tensors' bits."""
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def test_each_rank_has_its_place(world):
    assert isinstance(world, World)
    assert world.all_gather_object(world.rank, "ranks") == list(range(world.size))
    assert world.local_size == world.size  # one host
    assert world.device.type == "cpu"
    assert world.launch.size == world.size


def test_an_idle_engine_naps_unless_the_user_has_set_its_cycle(world, monkeypatch):
    assert "HOROVOD_CYCLE_TIME" not in os.environ  # what is set for the start alone is not handed on to programs
    monkeypatch.setattr(horovod, "_KNOWS_BFLOAT16", True)
    with horovod._long_naps(is_wanted=True):
        assert float(os.environ["HOROVOD_CYCLE_TIME"]) == 100
    assert "HOROVOD_CYCLE_TIME" not in os.environ
    with horovod._long_naps(is_wanted=False):  # with process sets, those in none wait for the others' looks
        assert "HOROVOD_CYCLE_TIME" not in os.environ
    monkeypatch.setenv("HOROVOD_CACHE_CAPACITY", "0")
    with horovod._long_naps(is_wanted=True):
        assert "HOROVOD_CYCLE_TIME" not in os.environ
    monkeypatch.delenv("HOROVOD_CACHE_CAPACITY")
    monkeypatch.setenv("HOROVOD_CYCLE_TIME", "2")
    with horovod._long_naps(is_wanted=True):
        assert os.environ["HOROVOD_CYCLE_TIME"] == "2"
    assert os.environ["HOROVOD_CYCLE_TIME"] == "2"
    monkeypatch.delenv("HOROVOD_CYCLE_TIME")
    monkeypatch.setattr(horovod, "_KNOWS_BFLOAT16", False)  # as released, the engine would sleep on
    with horovod._long_naps(is_wanted=True):
        assert "HOROVOD_CYCLE_TIME" not in os.environ


def test_all_reduce(world):
    mine = torch.tensor([world.rank + 1.0, 10.0 * world.rank], dtype=torch.float64)
    everyone = [torch.tensor([r + 1.0, 10.0 * r], dtype=torch.float64) for r in range(world.size)]
    for op, expected in {
        "sum": sum(everyone),
        "mean": sum(everyone) / world.size,
        "min": everyone[0],
        "max": everyone[-1],
    }.items():
        assert torch.allclose(world.all_reduce(mine, op, f"test.{op}"), expected, rtol=0, atol=1e-12), op


def test_all_reduce_of_a_transposed_tensor(world):
    matrix = torch.arange(6.0).view(2, 3).t()
    assert not matrix.is_contiguous()
    assert torch.equal(world.all_reduce(matrix, "sum", "test.transposed"), matrix * world.size)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16, torch.bool], ids=str)
def test_objects_with_tensors_arrive_bitwise(world, dtype):
    torch.manual_seed(1)
    sent = {
        "a": (torch.randn(3, 5) * 100).to(dtype).t(),
        "scalar": torch.tensor(1).to(dtype),
        "empty": torch.zeros(0, 2, dtype=dtype),
        "text": ["x", None, 3.5],
    }
    received = world.broadcast_object(sent if world.rank == 0 else None, f"test.object.{dtype}")
    assert received["text"] == sent["text"]
    for name in ("a", "scalar", "empty"):
        assert received[name].dtype == dtype
        assert received[name].shape == sent[name].shape
        assert torch.equal(received[name], sent[name])


def test_each_rank_is_sent_its_own_object_alone(world, monkeypatch):
    monkeypatch.setattr(scattering, "ROUND_BYTES", 64)  # what is sent takes several rounds

    def of(rank):
        torch.manual_seed(rank)
        kinds = {str(dtype): (torch.randn(rank, 3) * 9).to(dtype).t() for dtype in (*DTYPES, torch.bool)}
        odd = [torch.randn((), dtype=torch.complex64), torch.ones(1).expand(5), torch.randn(7).bfloat16()]
        odd.append({"rank": rank})
        return kinds, odd, torch.zeros(0, 2), "x" * 100 * rank

    before = world.handed_bytes["scattered"]
    received = world.scatter_object([of(rank) for rank in range(world.size)] if world.rank == 0 else None, "scattered")
    sent = world.handed_bytes["scattered"] - before
    (kinds, odd, empty, text), (own_kinds, own_odd, _, own_text) = received, of(world.rank)
    for name, tensor in own_kinds.items():
        assert kinds[name].dtype == tensor.dtype
        assert torch.equal(kinds[name], tensor), name
    assert all(torch.equal(one, other) for one, other in zip(odd[:3], own_odd[:3], strict=True))
    assert (odd[3], text, empty.shape) == ({"rank": world.rank}, own_text, (0, 2))
    most = sum(3000 + 100 * rank + sum(t.nbytes for t in of(rank)[0].values()) + 42 for rank in range(1, world.size))
    assert 0 < sent < most if world.rank == 0 and world.size > 1 else sent == 0


def test_broadcast_state_makes_ranks_bitwise_equal(world):
    torch.manual_seed(100 + world.rank)  # each rank begins elsewhere
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2).bfloat16())
    mine = digest(model.state_dict().values())
    assert len(set(world.all_gather_object(mine, "before"))) == world.size
    world.broadcast_state(model)
    after = world.all_gather_object(digest(model.state_dict().values()), "after")
    assert len(set(after)) == 1
    if world.rank == 0:
        assert after[0] == mine


MORE_TYPES = [torch.int8, torch.int16, torch.uint16, torch.uint32, torch.complex64, torch.complex128]
ALL_TYPES = [*DTYPES, *MORE_TYPES, torch.bfloat16, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", ALL_TYPES, ids=str)
def test_every_type_is_broadcast_and_reduced_or_refused(world, dtype):
    mine = (torch.arange(6).view(2, 3) % 2 + world.rank % 2).to(dtype).t()
    first = (torch.arange(6).view(2, 3) % 2).to(dtype).t()
    op = "max" if dtype == torch.bool else "sum"
    total = world.all_reduce(mine, op, f"test.type.{dtype}")
    assert total.dtype == dtype
    values = [(torch.arange(6).view(2, 3).t() % 2 + rank % 2).double() for rank in range(world.size)]
    expected = torch.stack(values).amax(0).clamp(max=1) if dtype == torch.bool else sum(values)
    assert torch.equal(total.to(torch.complex128).real, expected)
    if not dtype.is_floating_point and not dtype.is_complex:
        with pytest.raises(UsageError, match=r"'words seen' is .* which has no mean"):
            world.all_reduce(mine, "mean", "words seen")
    world.broadcast_tensors({"buffer": mine}, f"test.type.{dtype}")
    assert digest([mine]) == digest([first])


def test_parts_change_hands(world):
    mine = torch.arange(2 * world.size, dtype=torch.int16) + 100 * world.rank
    received = world.start_all_to_all(mine, "test.parts")()
    part = torch.arange(2) + 2 * world.rank
    assert received.tolist() == [int(n) + 100 * rank for rank in range(world.size) for n in part]


def test_gathered_lengths_may_differ(world):
    mine = torch.full((world.rank, 2), float(world.rank))
    gathered = world.start_all_gather(mine, "test.lengths")()
    assert gathered[:, 0].tolist() == [float(rank) for rank in range(world.size) for _ in range(rank)]


def test_every_result_is_kept_for_the_stream_that_goes_on_with_it(world, monkeypatch):
    """On GPUs torch must be told of a stream of the user's own; `tests/unit/test_streams.py` has what is told."""
    kept = []
    monkeypatch.setattr(handing_over, "keep_for_stream", kept.append)
    numbers = torch.arange(2.0 * world.size)
    starts = {
        "start_all_reduce_": lambda name: world.start_all_reduce_(numbers.clone(), "sum", name),
        "start_all_gather": lambda name: world.start_all_gather(numbers, name),
        "start_all_to_all": lambda name: world.start_all_to_all(numbers, name),
        "start_reduce_scatter": lambda name: world.start_reduce_scatter(numbers, [2] * world.size, name),
        "start_broadcast_": lambda name: world.start_broadcast_(numbers.clone(), name),
    }
    assert starts.keys() == {name for name in vars(HorovodWorld) if name.startswith("start_")}
    for name, start in starts.items():
        kept.clear()
        result = start(f"test.kept.{name}")()
        (seen,) = kept
        whole = seen[0] if isinstance(seen, tuple) else seen
        assert whole.data_ptr() == result.data_ptr() or name == "start_reduce_scatter"


def test_broadcast_state_takes_no_hidden_step(world):
    """Horovod's own `broadcast_optimizer_state` steps a fresh optimizer: weight decay would move the weights."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 2)
    before = digest(layer.state_dict().values())
    optimizer = world.wrap(torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.5), layer)
    world.broadcast_state(layer, optimizer)
    assert digest(layer.state_dict().values()) == before
    assert optimizer.state_dict()["state"] == {}


def test_broadcast_state_sends_learning_rate_and_moments(world):
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 2)
    own = torch.optim.AdamW(layer.parameters(), lr=0.1)
    if world.rank == 0:
        layer(torch.ones(1, 4)).sum().backward()
        own.step()
        own.param_groups[0]["lr"] = 0.25
    state = own.state_dict()
    layer.zero_grad()
    optimizer = world.wrap(torch.optim.AdamW(layer.parameters(), lr=0.1), layer)
    if world.rank == 0:
        optimizer.load_state_dict(state)
    world.broadcast_state(layer, optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.25
    moments = [value for entry in optimizer.state_dict()["state"].values() for value in entry.values()]
    assert len(moments) == 6
    assert len(set(world.all_gather_object(digest(moments), "moments"))) == 1


class Asking:
    """Samples that ask for the world where they are read."""

    def __len__(self):
        return 2

    def __getitem__(self, i):
        return hvdtrain.init().rank


def ask(answers):
    """Send what `init` says in this process."""
    try:
        answers.put(str(hvdtrain.init()))
    except LaunchError as error:
        answers.put(str(error))


def told_by_a_worker():
    """Return what the worker of a DataLoader was told; the loader ends with this call, its processes with it."""
    try:
        next(iter(DataLoader(Asking(), num_workers=1, multiprocessing_context="fork")))
    except LaunchError as error:
        return str(error)
    return "nothing"


def test_a_process_of_a_rank_is_no_rank(world):
    """What a rank forks has its memory and environment: it would take part in the job, and hang it."""
    if world.rank == 0 and world.size > 1:
        assert "worker 0 of a DataLoader is no rank" in told_by_a_worker()
        gc.collect()  # the loader, which hangs in a circle with the exception
        context = multiprocessing.get_context("fork")
        answers = context.SimpleQueue()
        child = context.Process(target=ask, args=(answers,))
        child.start()
        assert "a process that a rank has started is no rank" in answers.get()
        child.join()
    world.barrier("children")


def test_together_raises_on_all_ranks(world):
    def fail_on_last():
        if world.rank == world.size - 1:
            raise DataError("no such file")
        return "fine"

    where = "" if world.size == 1 else f"on rank {world.size - 1}: "
    with pytest.raises(DataError, match=f"^{where}no such file$"):
        world.together(fail_on_last, "test.fail")

    def fail_everywhere():
        raise ConfigError("wrong")

    with pytest.raises(ConfigError, match=r"^wrong$"):
        world.together(fail_everywhere, "test.fail_everywhere")
    assert world.together(lambda: world.rank, "test.fine") == world.rank
