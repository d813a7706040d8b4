"""The loader: batches that are read ahead are those that would have been read anyway, and threads end."""

import gc
import random
import threading
import time

import numpy as np
import pytest
import torch

from hvdtrain.data.draws import Draws
from hvdtrain.data.loader import Loader
from hvdtrain.data.order import EvaluationOrder, SampleOrder
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


def read(data, steps, depth=1, rank=0, size=1, in_step=False):
    order, seen = order_of(len(data), size), []
    with Loader(data, order, rank, in_step=in_step, depth=depth) as loader:
        for step in steps:
            for place, samples in enumerate(order.batches(step, rank, in_step)):
                batch = loader.read(step, place)
                assert batch[-1].tolist() == samples.tolist()
                seen.append([tensor.tolist() for tensor in batch])
    return seen


def data_threads():
    return [thread for thread in threading.enumerate() if thread.name == "hvdtrain-data"]


def wait_until(is_so):
    until = time.monotonic() + 10
    while not is_so() and time.monotonic() < until:
        time.sleep(0.01)
    assert is_so()


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    wait_until(lambda: not data_threads())


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
    assert [len(order_of(9, 4).batches(step, 0)) for step in range(4)] == [1, 0, 1, 0]
    assert len(read(data, range(6), rank=0, size=4)) == 3
    assert data.threads.count(threading.main_thread().name) == 1  # the very first


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_so_many_are_read_ahead(depth):
    data = Numbers()
    with Loader(data, order_of(), 0, depth=depth) as loader:
        loader.read(0, 0)
        wait_until(lambda: len(data.threads) == 1 + depth)
        time.sleep(0.05)
        assert len(data.threads) == 1 + depth


def test_an_error_comes_where_the_batch_is_asked_for():
    order = order_of()
    data = Numbers(bad=(int(order.batches(1, 0)[0][0]),))
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
    wait_until(lambda: not data_threads())


def test_a_closed_loader_still_reads():
    loader = Loader(Numbers(), order_of(), 0)
    loader.read(0, 0)
    loader.close()
    loader.close()
    assert loader.read(0, 1)[0].tolist() == order_of().batches(0, 0)[1].tolist()


def test_evaluation_reads_every_sample_once():
    data, order = Numbers(size=10), EvaluationOrder(10, 2, 3)
    assert order.most_batches == 2
    seen = []
    for rank in range(3):
        with Loader(data, order, rank) as loader:
            seen += [int(i) for place in range(len(order.batches(0, rank))) for i in loader.read(0, place)[0]]
    assert seen == list(range(10))


def drawn(size, epochs=2, seed=0):
    """Return what each sample drew in each epoch, by all ranks together."""
    found = {}
    for rank in range(size):
        order = order_of(21, size, seed)
        with Loader(Noisy(), order, rank) as loader:
            for step in range(epochs * order.steps_per_epoch):
                for place in range(len(order.batches(step, rank))):
                    numbers, samples = loader.read(step, place)
                    for number, sample in zip(numbers.tolist(), samples.tolist(), strict=True):
                        assert (sample, order.epoch(step)) not in found
                        found[sample, order.epoch(step)] = tuple(number)
    return found


def test_a_sample_draws_alike_on_any_number_of_ranks():
    alone = drawn(1)
    assert len(alone) == len(set(alone.values())) == 42  # each sample, and each epoch, something else
    assert drawn(2) == drawn(4) == alone
    assert not set(drawn(1, seed=1).values()) & set(alone.values())


def test_all_three_generators_draw_for_a_sample_and_are_put_back():
    def draw():
        return torch.rand(()).item(), np.random.rand(), random.random()

    def of(samples, i, seed=0, epoch=0):
        with Draws(seed, epoch, torch.tensor(samples)).of_sample(i):
            return draw()

    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    first, second = draw(), draw()
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    assert draw() == first
    assert of([7, 5], 1) == of([5], 0)
    assert len({of([5], 0), of([6], 0), of([5], 0, epoch=1), of([5], 0, seed=1)}) == 4
    assert draw() == second
