"""Gradient buckets: a pure function of the parameters."""

import torch
from torch.nn import Parameter

from hvdtrain.world import buckets


def test_buckets_cover_every_parameter_once_in_reverse(monkeypatch):
    monkeypatch.setattr(buckets, "FIRST_BUCKET_BYTES", 40)
    parameters = [Parameter(torch.zeros(n)) for n in (200, 30, 50, 20, 6, 3)]
    sizes = [[p.numel() for p in bucket] for bucket in buckets.in_buckets(parameters, 400)]
    assert sizes == [[3, 6], [20, 50, 30], [200]]


def test_types_do_not_mix():
    parameters = [Parameter(torch.zeros(2)), Parameter(torch.zeros(2).double()), Parameter(torch.zeros(2))]
    assert [len(bucket) for bucket in buckets.in_buckets(parameters, 400)] == [1, 1, 1]
    assert buckets.in_buckets([], 400) == []
