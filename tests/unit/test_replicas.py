"""Digests of tensors: any change shows, and the place of the first difference is named."""

import copy

import pytest
import torch

from hvdtrain.errors import UsageError
from hvdtrain.trainer.strategy import model_tensors
from hvdtrain.world.replicas import first_difference, keep_per_rank, per_rank_buffers, tensor_digest

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_and_every_place_counts(dtype):
    torch.manual_seed(0)
    tensor = torch.randint(0, 2, (50,)).to(dtype)
    same = tensor_digest(tensor)
    assert tensor_digest(tensor.clone()) == same
    for place in (0, 17, 49):
        changed = tensor.clone()
        changed[place] = 1 - changed[place].to(torch.int64 if dtype == torch.bool else dtype)
        assert tensor_digest(changed) != same
    swapped = tensor.clone()
    first = int((tensor != tensor[0]).nonzero()[0])
    swapped[[0, first]] = tensor[[first, 0]]
    assert tensor_digest(swapped) != same


def test_layout_does_not_count_and_chunks_do_not_show(monkeypatch):
    tensor = torch.randn(30, 40)
    transposed = tensor.t().contiguous().t()
    assert tensor_digest(transposed) == tensor_digest(tensor)
    whole = tensor_digest(tensor)
    monkeypatch.setattr("hvdtrain.world.replicas._CHUNKS", {False: 7})
    assert tensor_digest(tensor) == whole
    assert tensor_digest(torch.zeros(0)) == 0


def test_the_first_difference_is_named():
    assert first_difference([{"a": 1, "b": 2}, {"a": 1, "b": 2}]) is None
    assert first_difference([{"a": 1, "b": 2}, {"a": 1, "b": 3}, {"a": 1}]) == ("b", [1, 2])
    assert first_difference([{"a": 2}, {"a": 1}, {"a": 1}]) == ("a", [0])
    assert first_difference([{"a": 2}, {"a": 1}]) == ("a", [1])


def test_a_buffer_can_be_each_ranks_own():
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.Module())
    model[1].register_buffer("queue", torch.zeros(3))
    with pytest.raises(UsageError, match=r"no buffer 'que' in this Module: it has \['queue'\]"):
        keep_per_rank(model[1], "que")
    keep_per_rank(model[1], "queue")
    assert per_rank_buffers(copy.deepcopy(model)) == {"1.queue"}
    assert "1.queue" not in model_tensors(model)
    assert "0.running_mean" in model_tensors(model)
