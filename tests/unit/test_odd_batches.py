"""Batches of whatever form: mapped, hashed and sent by a worker as they are, their classes kept."""

import dataclasses

import pytest
import torch
from odd_batches import BATCHES, Kinds, Unsendable

from hvdtrain.data.draws import Draws, Request
from hvdtrain.data.fingerprint import fingerprint_of
from hvdtrain.data.loader import Reading
from hvdtrain.data.nested import fields_of, leaves_in, map_tensors, tensors_in
from hvdtrain.errors import DataError

# Their classes cannot be pickled, whoever does it.
NOT_PICKLED = ("frozen mapping", "strict tuple")
pytestmark = pytest.mark.filterwarnings("default")  # torch warns of sparse and quantized tensors


def is_same(one, other):
    """Tell whether two batches are of one form and hold the same."""
    if isinstance(one, torch.Tensor):
        one, other = (tensor.dequantize() if tensor.is_quantized else tensor.to_dense() for tensor in (one, other))
        is_equal = torch.equal(*(tensor.detach().to(torch.complex128) for tensor in (one, other)))
        return one.dtype == other.dtype and is_equal
    pairs = zip(leaves_in(one), leaves_in(other), strict=True)
    is_alike = all(is_same(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)
    return type(one) is type(other) and is_alike


@pytest.mark.parametrize("kind", BATCHES)
def test_a_batch_keeps_its_form(kind):
    batch = BATCHES[kind]()
    count = len([*tensors_in(batch)])
    assert count
    assert is_same(map_tensors(lambda tensor: tensor, batch), batch)
    marks = map_tensors(lambda tensor: "mark", batch) if kind != "packed sequence" else None
    if marks is not None:
        assert [*leaves_in(marks)].count("mark") == count
        assert [*tensors_in(marks)] == []
    assert dataclasses.is_dataclass(batch) == bool(fields_of(batch))


def test_a_worker_sends_them_as_they_are():
    kinds = [kind for kind in BATCHES if kind not in NOT_PICKLED]
    pool = Reading(workers=1).reader_of(Kinds(), "test")
    try:
        numbers = [torch.tensor([list(BATCHES).index(kind)]) for kind in kinds]
        waits = [pool.start(Request(number, Draws(0, 0, number))) for number in numbers]
        sent = {kind: wait() for kind, wait in zip(kinds, waits, strict=True)}
    finally:
        pool.close()
    for kind in kinds:
        assert is_same(sent[kind], BATCHES[kind]()), kind
    assert sent["user's dictionary"].encodings == "kept"
    assert torch.equal(sent["attributes"].x, BATCHES["tensor"]())
    assert sent["list with a name"].name == "named"


def test_what_cannot_be_sent_is_told_and_the_next_batch_comes():
    pool = Reading(workers=1).reader_of(Unsendable(), "test")
    try:
        waits = [pool.start(Request(torch.tensor([i]), Draws(0, 0, torch.tensor([i])))) for i in range(4)]
        assert waits[0]()[1] == 1
        with pytest.raises(DataError, match=r"no process can give to another .*--data\.workers 0"):
            waits[1]()
        with pytest.raises(DataError, match=r"no process can give to another \(ValueError\)"):
            waits[2]()
        assert waits[3]()[1] == 1
    finally:
        pool.close()


def test_data_of_every_kind_has_a_print():
    class One(Kinds):
        def __init__(self, kind):
            self.kind = kind

        def __len__(self):
            return 1

        def batch(self, indices):
            return BATCHES[self.kind]()

    prints = {kind: fingerprint_of(One(kind))["samples"] for kind in BATCHES}
    assert prints == {kind: fingerprint_of(One(kind))["samples"] for kind in BATCHES}
    assert all(prints.values())
    assert len({prints[kind] for kind in ("tensor", "bits", "nothing", "quantized", "conjugate")}) == 5
