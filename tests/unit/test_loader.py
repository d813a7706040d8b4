"""The loader: batches that are read ahead are those that would have been read anyway, and threads end."""

import gc
import random
import threading
import time

import numpy as np
import pytest
import torch
from patience import wait_for

from hvdtrain.data.dataset import TensorSamples
from hvdtrain.data.draws import Draws, is_same_state, kept_random_state, random_state
from hvdtrain.data.loader import Loader, Reading
from hvdtrain.data.order import EvaluationOrder, SampleOrder
from hvdtrain.data.vision import ImageTensors
from hvdtrain.errors import DataError
from hvdtrain.settings import BatchPlan


class Numbers:
    """Sample i is the number i; notes who reads."""

    reads_ahead = True

    def __init__(self, bad=(), size=21):
        self.bad = bad
        self.size = size
        self.threads = []

    def __len__(self):
        return self.size

    def batch(self, indices):
        self.threads.append(threading.current_thread().name)
        if any(int(i) in self.bad for i in indices):
            raise OSError("sample cannot be read")
        return (indices.clone(),)

    def num_targets(self, indices):
        return len(indices)


class Others(Numbers):
    """Reads in its own way, and has not said that another thread may do it."""

    def batch(self, indices):
        return super().batch(indices)


class Noisy(Numbers):
    """A sample is what it draws."""

    reads_ahead = True

    def batch(self, indices, draws):
        return (torch.stack([torch.rand(2, generator=draws.generator(i)) for i in range(len(indices))]), indices)


def order_of(num_samples=21, size=1, seed=0):
    return SampleOrder(num_samples, BatchPlan(8, 2, 4 // size, size), seed)


def samples_of(order, step, rank, in_step=False):
    return [request.samples for request in order.requests(step, rank, in_step)]


def read(data, steps, depth=1, rank=0, size=1, in_step=False):
    order, seen = order_of(len(data), size), []
    with Loader(data, order, rank, in_step=in_step, reading=Reading(ahead=depth)) as loader:
        for step in steps:
            for place, samples in enumerate(samples_of(order, step, rank, in_step)):
                batch = loader.read(step, place)
                assert batch[-1].tolist() == samples.tolist()
                seen.append([tensor.tolist() for tensor in batch])
    return seen


def data_threads():
    return [thread for thread in threading.enumerate() if thread.name == "hvdtrain-data"]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    wait_for(lambda: not data_threads())


@pytest.mark.parametrize("depth", [1, 2, 7])
@pytest.mark.parametrize("in_step", [False, True])
def test_what_is_read_ahead_is_what_is_asked_for(depth, in_step):
    ahead, plain = Numbers(), Others()
    steps = [*range(7), 0, 1, 5]  # over the ends of epochs, with short batches, and not always the next step
    assert read(ahead, steps, depth, in_step=in_step) == read(plain, steps, depth, in_step=in_step)
    assert "hvdtrain-data" in ahead.threads
    assert set(plain.threads) == {threading.main_thread().name}


def test_a_step_without_samples_does_not_end_the_reading_ahead():
    """Of 9 samples and a batch of 8, rank 0 of 4 has none in every second step."""
    data = Numbers(size=9)
    assert [len(samples_of(order_of(9, 4), step, 0)) for step in range(4)] == [1, 0, 1, 0]
    assert len(read(data, range(6), rank=0, size=4)) == 3
    assert set(data.threads) == {"hvdtrain-data"}


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_so_many_are_read_ahead(depth):
    data = Numbers()
    with Loader(data, order_of(), 0, reading=Reading(ahead=depth)) as loader:
        loader.read(0, 0)
        wait_for(lambda: len(data.threads) == 1 + depth)
        time.sleep(0.05)
        assert len(data.threads) == 1 + depth


def test_an_error_comes_where_the_batch_is_asked_for():
    order = order_of()
    data = Numbers(bad=(int(samples_of(order, 1, 0)[0][0]),))
    with Loader(data, order, 0) as loader:
        for place in range(4):
            loader.read(0, place)  # the thread has met it by the last
        with pytest.raises(OSError, match="sample cannot be read"):
            loader.read(1, 0)


def test_a_forgotten_loader_ends_its_thread_too():
    loader = Loader(Numbers(), order_of(), 0)
    loader.read(0, 0)
    assert data_threads()
    del loader
    gc.collect()
    wait_for(lambda: not data_threads())


def test_a_loader_can_be_closed_twice():
    loader = Loader(Numbers(), order_of(), 0)
    loader.read(0, 0)
    loader.close()
    loader.close()
    wait_for(lambda: not data_threads())


def test_evaluation_reads_every_sample_once():
    data, order = Numbers(size=10), EvaluationOrder(10, 2, 3)
    assert order.most_batches == 2
    seen = []
    for rank in range(3):
        with Loader(data, order, rank) as loader:
            seen += [int(i) for place in range(len(order.requests(0, rank))) for i in loader.read(0, place)[0]]
    assert seen == list(range(10))


class Careless(Numbers):
    """Draws from all generators at once, as if nobody else read."""

    def batch(self, indices):
        n = len(indices)
        return (torch.rand(n, 2) + torch.from_numpy(np.random.rand(n, 2)) + random.random(), indices)


def drawn(size, epochs=2, seed=0, kind=Noisy):
    """Return what each sample drew in each epoch, by all ranks together."""
    found = {}
    for rank in range(size):
        order = order_of(21, size, seed)
        with Loader(kind(), order, rank) as loader:
            for step in range(epochs * order.steps_per_epoch):
                for place in range(len(order.requests(step, rank))):
                    numbers, samples = loader.read(step, place)
                    for number, sample in zip(numbers.tolist(), samples.tolist(), strict=True):
                        assert (sample, order.epoch(step)) not in found
                        found[sample, order.epoch(step)] = tuple(number)
    return found


@pytest.mark.parametrize("kind", [Noisy, Careless])
def test_a_sample_draws_alike_on_any_number_of_ranks(kind):
    alone = drawn(1, kind=kind)
    assert len(alone) == len(set(alone.values())) == 42  # each sample, and each epoch, something else
    assert drawn(2, kind=kind) == drawn(4, kind=kind) == alone
    assert not set(drawn(1, seed=1, kind=kind).values()) & set(alone.values())


def test_reading_leaves_the_generators_alone():
    before = random_state()
    drawn(1, kind=Careless)
    assert is_same_state(before, random_state())
    torch.rand(1)
    assert not is_same_state(before, random_state())


class Ragged(Careless):
    def batch(self, indices):
        return (torch.rand(len(indices), 1 + int(indices.max())),)


def test_samples_that_draw_and_do_not_fit_together_are_explained():
    with pytest.raises(DataError, match="let it take a second argument, `draws`"):
        Loader(Ragged(), order_of(), 0).read(0, 0)


def test_all_three_generators_draw_for_a_sample():
    def of(samples, i, seed=0, epoch=0):
        with kept_random_state():
            Draws(seed, epoch, torch.tensor(samples)).seed_generators(i)
            return torch.rand(()).item(), np.random.rand(), random.random()

    assert of([7, 5], 1) == of([5], 0)
    different = [of([5], 0), of([6], 0), of([5], 0, epoch=1), of([5], 0, seed=1)]
    assert all(len(set(numbers)) == 4 for numbers in zip(*different, strict=True))


@pytest.mark.parametrize(
    "data", [TensorSamples(torch.arange(21)), ImageTensors(torch.zeros(21, 2, 2, dtype=torch.uint8), torch.arange(21))]
)
def test_data_in_memory_is_read_when_it_is_needed_unless_more_is_asked_for(data):
    before = {*threading.enumerate()}  # of which some may be about to end
    with Loader(data, order_of(), 0):
        assert {*threading.enumerate()} <= before
    with Loader(data, order_of(), 0, reading=Reading(ahead=1)):
        assert len({*threading.enumerate()} - before) == 1


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint64, torch.bool, torch.bfloat16, torch.complex64, torch.int8])
@pytest.mark.parametrize("shape", [(9,), (9, 3)])
def test_rows_of_tensors_of_every_type(dtype, shape):
    rows = torch.arange(torch.Size(shape).numel()).view(shape).to(dtype)
    (batch,) = TensorSamples(rows).batch(torch.tensor([4, 0, 4]))
    assert [row.tolist() for row in batch] == [rows[i].tolist() for i in (4, 0, 4)]
