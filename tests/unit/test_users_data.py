"""Data that users bring: torch's map-style data sets, and streams that go on where they were."""

import collections
import io
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import ChainDataset, DataLoader, IterableDataset, TensorDataset
from users_data import Augmented, Counting, Endless

from hvdtrain.data.dataset import TensorSamples
from hvdtrain.data.draws import Draws
from hvdtrain.data.nested import map_tensors, tensors_in
from hvdtrain.data.stream import ENDLESS, StreamSamples
from hvdtrain.data.users import MapSamples, as_dataset
from hvdtrain.errors import DataError


def test_kinds_of_data():
    own = TensorSamples(torch.arange(3))
    assert as_dataset(own) is own
    assert type(as_dataset(TensorDataset(torch.arange(3)))) is MapSamples
    assert type(as_dataset([1, 2, 3])) is MapSamples
    assert type(as_dataset(Counting(3))) is StreamSamples
    assert type(as_dataset(iter([1]))) is StreamSamples


@pytest.mark.parametrize(
    ("data", "collate", "says"),
    [
        (DataLoader(TensorDataset(torch.arange(3))), None, "train_data=loader.dataset"),
        (3, None, "int cannot be read as data"),
        (TensorDataset, None, r"the class TensorDataset is given as data: make an object of it"),
        ("photos", None, "'photos' is given as data: a path is not read here"),
        (Path("photos"), None, "'photos' is given as data: a path is not read here"),
        ({"train": [1], "test": [2]}, None, r"a dict has its parts by name.*data\['train'\]"),
        ({"a", "b"}, None, r"a set has no order"),
        ((torch.zeros(9, 3), torch.zeros(9)), None, r"a tuple of 2 arrays is 2 samples.*TensorSamples\(x, y\)"),
        ((np.zeros((9, 3)), np.zeros(9)), None, r"a tuple of 2 arrays is 2 samples"),
    ],
)
def test_what_is_no_data_is_explained(data, collate, says):
    with pytest.raises(DataError, match=says):
        as_dataset(data, collate)


def test_batches_are_collated():
    data = as_dataset(TensorDataset(torch.arange(4), torch.arange(4) * 10.0))
    first, second = data.batch(torch.tensor([2, 0]))
    assert first.tolist() == [2, 0]
    assert second.tolist() == [20, 0]
    assert data.num_targets(torch.tensor([2, 0])) == 2
    assert [list(tensor.shape) for tensor in data.batch(torch.tensor([], dtype=torch.int64))] == [[0], [0]]
    assert as_dataset([1, 2], sum).batch(torch.tensor([0, 1])) == 3
    with pytest.raises(DataError, match=r"default_collate makes no batch of the samples of builtins.list .*collate"):
        as_dataset([torch.zeros(1), torch.zeros(2)]).batch(torch.arange(2))


class Wordless(collections.UserList):
    """A sample that cannot be collated, and raises an error that says nothing."""

    def __len__(self):
        raise RuntimeError


def test_an_error_without_words_is_told_by_its_type():
    with pytest.raises(DataError, match=r"default_collate makes no batch of .* \(RuntimeError\): give Task\(collate="):
        as_dataset([Wordless([1]), Wordless([2])]).batch(torch.arange(2))


def test_nested_batches():
    batch = {"a": torch.tensor([1]), "b": [torch.tensor([2]), ("c", torch.tensor([3]))], "d": None}
    assert map_tensors(lambda tensor: tensor.item(), batch) == {"a": 1, "b": [2, ("c", 3)], "d": None}
    assert [tensor.item() for tensor in tensors_in(batch)] == [1, 2, 3]


def test_an_empty_batch_of_nested_samples_has_the_form_of_a_full_one():
    batch = MapSamples(Augmented()).batch(torch.tensor([], dtype=torch.int64))
    assert batch["drawn"].shape == (0, 3)
    assert batch["more"].image.shape == (0, 2, 3)


def values(data, indices, epoch=0):
    numbers, drawn = data.batch(torch.tensor(indices), Draws(0, epoch, torch.tensor(indices)))
    return numbers.tolist(), drawn.tolist()


@pytest.mark.parametrize("stream", [Endless, lambda: Counting(1000)])
def test_ranks_see_their_parts_of_one_stream(stream):
    whole = values(as_dataset(stream()), list(range(8)))
    assert whole[0] == list(range(8))
    assert len(set(whole[1])) == 8
    for rank in range(2):
        data = as_dataset(stream())
        for step in range(2):
            begin = 4 * step + 2 * rank
            numbers, drawn = values(data, [begin, begin + 1])
            assert numbers == whole[0][begin : begin + 2]
            assert drawn == whole[1][begin : begin + 2]


def test_a_stream_that_ends_begins_again():
    data = as_dataset(Counting(5))
    assert len(data) == 5
    assert values(data, [3, 4])[0] == [3, 4]
    first = values(data, [0, 1], epoch=1)
    assert first[0] == [0, 1]
    assert first[1] != values(data, [0, 1])[1]  # an earlier place is found again
    assert values(data, [0, 1], epoch=1) == first
    chained = as_dataset(ChainDataset([Counting(2), Counting(1)]))  # knows its length from theirs
    assert len(chained) == 3
    assert len(as_dataset(ChainDataset([OfIterations(2)]))) == ENDLESS  # has a length that nobody knows
    endless = as_dataset(iter_of(3))
    assert len(endless) == ENDLESS
    assert values(endless, [2, 3, 4, 5, 6])[0] == [2, 0, 1, 2, 0]


class iter_of:  # noqa: N801
    """Can be iterated again and again, and does not say how long it is."""

    def __init__(self, size):
        self.size = size

    def __iter__(self):
        return iter((i, torch.rand(())) for i in range(self.size))


class OfIterations(iter_of, IterableDataset):
    """The same as torch has it."""


@pytest.mark.parametrize(
    ("stream", "says"),
    [
        (Counting(5, yields=3), "has ended after 3 samples, but its length is 5"),
        (iter_of(0), "has ended after 0 samples"),
    ],
)
def test_streams_that_end_elsewhere_are_explained(stream, says):
    with pytest.raises(DataError, match=says):
        values(as_dataset(stream), [0, 1, 2, 3])


def yielded():
    yield from ((i, torch.rand(())) for i in range(5))


class Itself:
    """An iterator of one's own that does not begin anew."""

    def __init__(self):
        self.left = list(range(5))

    def __iter__(self):
        return self

    def __next__(self):
        if not self.left:
            raise StopIteration
        return self.left.pop(0), torch.rand(())


ONCE = {
    "a generator": yielded,
    "an expression": lambda: (pair for pair in yielded()),
    "a list's iterator": lambda: iter([*yielded()]),
    "zip": lambda: zip(range(5), torch.rand(5), strict=True),
    "map": lambda: map(tuple, zip(range(5), torch.rand(5), strict=True)),
    "itertools": lambda: itertools.chain(yielded()),
    "one's own": Itself,
}


@pytest.mark.parametrize("kind", ONCE)
def test_what_comes_once_is_read_once_and_no_more_in_silence(kind):
    data = as_dataset(ONCE[kind]())
    assert values(data, [0, 1, 2])[0] == [0, 1, 2]
    assert values(data, [3, 4])[0] == [3, 4]
    with pytest.raises(DataError, match="comes once, and is needed again, from its beginning: give a class"):
        values(data, [5])
    if kind != "one's own":
        data = as_dataset(ONCE[kind]())
        values(data, [2])
        with pytest.raises(DataError, match="comes once"):  # what came before is gone
            values(data, [0])


@pytest.mark.parametrize("stream", [Endless, lambda: Counting(7), lambda: iter_of(7)])
@pytest.mark.parametrize("position", [0, 4, 6])
def test_a_resumed_stream_goes_on_exactly(stream, position):
    """Also when it was read ahead of the step that was saved, and by other ranks than before."""
    data = as_dataset(stream())

    def at(data, i, count=2):
        epoch, index = divmod(i, len(data))
        return values(data, [index], epoch) if count == 1 else [at(data, i + k, 1) for k in range(count)]

    expected = [at(data, i) for i in range(0, 12, 2)]
    saved = io.BytesIO()
    torch.save(data.state_at(position), saved)
    saved.seek(0)
    again = as_dataset(stream())
    again.go_on(torch.load(saved, weights_only=True))
    assert [at(again, i) for i in range(position, 12, 2)] == expected[position // 2 :]
    if stream is Endless and position:
        assert again.stream.yielded == 12 - position  # nothing was read twice


class Odd(Endless):
    def state_dict(self):
        return {"next": [{"deep": object()}]}


def test_a_state_that_no_checkpoint_can_hold_is_refused():
    data = as_dataset(Odd())
    values(data, [0])
    with pytest.raises(DataError, match=r"state_dict\(\) of the stream Odd holds a builtins.object"):
        data.state_at(0)
