"""What samples draw from generators of their own is a function of (seed, epoch, sample) as well."""

import random

import pytest
import torch
from own_draws import KINDS, OF_THE_FILE, Drawing, Running, Whole
from torch.utils.data import ConcatDataset, Subset, default_collate

from hvdtrain.data.draws import Draws, Request
from hvdtrain.data.loader import Reading
from hvdtrain.data.own_generators import generators_in
from hvdtrain.data.readers import BatchSource
from hvdtrain.data.stream import StreamSamples
from hvdtrain.data.users import as_dataset

FORMS = {
    "map": lambda kind: as_dataset(Drawing(kind)),
    "subset": lambda kind: as_dataset(Subset(ConcatDataset([Drawing(kind)]), range(12))),
    "own kind": Whole,
}


def read(source, samples, epoch=0, seed=0):
    samples = torch.tensor(samples)
    batch = source.read(Request(samples, Draws(seed, epoch, samples)))
    return (batch[0] if isinstance(batch, tuple) else batch).tolist()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_draws_alike_wherever_it_is_read(kind, form):
    whole = read(BatchSource(FORMS[form](kind)), list(range(12)))
    assert len(set(whole)) == 12
    other = BatchSource(FORMS[form](kind))  # of another rank, or after a resume
    assert read(other, [7, 3]) == [whole[7], whole[3]]
    assert read(other, [3]) == [whole[3]]
    assert read(other, [3], epoch=1) != [whole[3]]
    assert read(other, [3], seed=1) != [whole[3]]


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_draws_alike_on_every_rank_and_after_a_resume(kind):
    def stream():
        return StreamSamples(Running(kind), default_collate)

    samples = torch.arange(12)
    whole = stream().batch(samples, Draws(0, 0, samples)).tolist()
    assert len(set(whole)) == 12
    assert stream().batch(samples[5:8], Draws(0, 0, samples[5:8])).tolist() == whole[5:8]


def test_a_worker_draws_the_same():
    data = as_dataset(ConcatDataset([Drawing(kind) for kind in ("numpy", "composed")]))
    expected = read(BatchSource(data), [3, 15])
    pool = Reading(workers=1).reader_of(data, "test")
    try:
        samples = torch.tensor([15, 3])
        assert pool.start(Request(samples, Draws(0, 0, samples)))().tolist() == expected[::-1]
    finally:
        pool.close()


def test_they_are_found_without_running_code_or_walking_through_all_data():
    class Trap(Drawing):
        @property
        def lazy(self):
            raise AssertionError("a property was asked")

        def __getattr__(self, name):
            raise AttributeError(name)

    trap = Trap("numpy")
    trap.paths = [f"{number}.png" for number in range(10**5)]
    trap.itself = trap
    trap.nested = [[[{"deep": [random.Random(1)]}]]]
    found = generators_in(trap)
    assert {trap.numpy, trap.nested[0][0][0]["deep"][0], Drawing.of_the_class, OF_THE_FILE} <= {*found}
    assert len({*found}) == len(found)
    assert generators_in([torch.zeros(3), "text", len, print]) == ()
