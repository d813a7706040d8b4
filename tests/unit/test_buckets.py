"""Gradient buckets: a pure function of the parameters."""

import itertools

import pytest
import torch
from torch.nn import Parameter

from hvdtrain.world import Averaging, EchoWorld, buckets
from hvdtrain.world.filling import fill_at_once, fill_one_by_one


def _one_by_one(wire, views, gradients, size):
    fill_one_by_one(views, gradients, size)


def test_buckets_cover_every_parameter_once_in_reverse(monkeypatch):
    monkeypatch.setattr(buckets, "FIRST_BUCKET_BYTES", 40)
    parameters = [Parameter(torch.zeros(n)) for n in (200, 30, 50, 20, 6, 3)]
    sizes = [[p.numel() for p in bucket] for bucket in buckets.in_buckets(parameters, 400)]
    assert sizes == [[3, 6], [20, 50, 30], [200]]


def test_what_is_finished_last_leaves_in_ever_smaller_parts(monkeypatch):
    """While one travels backward computes what follows: little is left to send when it is over."""
    monkeypatch.setattr(buckets, "FIRST_BUCKET_BYTES", 40)
    sizes = [5, 3, 1, 4, 2, 9, 1, 20, 1, 25, 30, 8]
    parameters = [Parameter(torch.zeros(n)) for n in sizes]
    found = buckets.in_buckets(parameters, 800)
    flat = [p for bucket in found for p in bucket]
    assert all(a is b for a, b in zip(flat, reversed(parameters), strict=True))
    of_each = [sum(p.nbytes for p in bucket) for bucket in found[1:]]  # of the first: what backward begins with
    assert of_each[-1] <= 40
    assert all(before <= 4 * after for before, after in itertools.pairwise(of_each))
    assert len(of_each) == 4
    few = [Parameter(torch.zeros(n)) for n in (10, 10, 10, 10)]
    assert [len(bucket) for bucket in buckets.in_buckets(few, 800)] == [1, 3]  # little enough as it is


@pytest.mark.parametrize("seed", range(5))
def test_buckets_that_are_not_cut_are_made_of_whole_parts(monkeypatch, seed):
    monkeypatch.setattr(buckets, "FIRST_BUCKET_BYTES", 40)
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 60, (40,), generator=generator).tolist()
    parameters = [Parameter(torch.zeros(n)) for n in sizes]
    uncut = buckets.in_buckets(parameters, 800, in_parts=False)
    flat = [p for bucket in uncut for p in bucket]
    assert all(a is b for a, b in zip(flat, reversed(parameters), strict=True))
    number = {p: i for i, bucket in enumerate(uncut) for p in bucket}
    parts = buckets.in_buckets(parameters, 800)
    assert len(parts) > len(uncut)
    assert all(len({number[p] for p in part}) == 1 for part in parts)


def test_types_do_not_mix():
    parameters = [Parameter(torch.zeros(2)), Parameter(torch.zeros(2).double()), Parameter(torch.zeros(2))]
    assert [len(bucket) for bucket in buckets.in_buckets(parameters, 400)] == [1, 1, 1]
    assert buckets.in_buckets([], 400) == []


@pytest.mark.parametrize(
    ("dtype", "in_buffer"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float64),
        (torch.complex64, torch.float32),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.float16),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_what_is_filled_at_once_is_what_is_filled_one_by_one(dtype, in_buffer, size):
    """Bit by bit: gradients that are missing, not contiguous, or lie in the buffer already."""
    shapes = [(3, 4), (5,), (2, 3)]
    filled = []
    for fill in (_one_by_one, fill_at_once):
        generator = torch.Generator().manual_seed(1)
        numbers = [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
        wide = (2,) if dtype.is_complex else ()
        wholes = [torch.empty(*shape, *wide) for shape in shapes]
        wire = torch.full((sum(whole.numel() for whole in wholes),), 9.0, dtype=in_buffer)
        parts = wire.split([whole.numel() for whole in wholes])
        views = [part.view(whole.shape) for part, whole in zip(parts, wholes, strict=True)]
        fill(wire, views, [numbers[0].t().contiguous().t(), None, numbers[2]], size)
        filled.append([view.clone() for view in views])
        fill(wire, views, [torch.view_as_complex(view) if wide else view for view in views], size)
        filled[-1] += views
    assert all(torch.equal(a, b) for a, b in zip(*filled, strict=True))
    assert filled[0][1].count_nonzero() == 0
    assert filled[0][0].count_nonzero() > 0


@pytest.mark.parametrize("fill", [_one_by_one, fill_at_once])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_part_of_the_mean_fits_into_fp16_where_the_whole_gradient_does_not(fill, dtype):
    """Nor is it rounded before it is divided, which would round it twice."""
    gradients = [torch.tensor([1e5, -2e5], dtype=dtype), torch.tensor([2049.0], dtype=dtype)]
    wire = torch.zeros(sum(map(len, gradients)), dtype=torch.float16)
    views = wire.split([len(gradient) for gradient in gradients])
    fill(wire, views, gradients, 6)
    assert all(torch.equal(view, (own.double() / 6).half()) for view, own in zip(views, gradients, strict=True))


@pytest.mark.parametrize(("compression", "expected"), [("none", 4), ("fp16", 4), ("int8", 1), ("powersgd:1", 2)])
def test_a_format_that_leaves_few_bytes_travels_in_few_parts(compression, expected):
    """Each part makes such a format wait for the network twice: they stay together."""
    world = EchoWorld(torch.device("cpu"), 2)
    model = torch.nn.Sequential(*(torch.nn.Linear(512, 512, bias=False) for _ in range(6)))  # 1 MiB each
    optimizer = world.wrap(
        torch.optim.SGD(model.parameters(), lr=0.1), model, Averaging(compression=compression, warns_of_copies=False)
    )
    for _ in range(2):
        world.messages.clear()
        model(torch.ones(1, 512)).sum().backward()
        optimizer.step()
    assert sum(message.num_bytes > 4 for message in world.messages) == expected  # of PowerSGD, two for a bucket


def test_second_factors_of_all_buckets_are_one_message():
    world = EchoWorld(torch.device("cpu"), 2)
    model = torch.nn.Sequential(*(torch.nn.Linear(512, 512, bias=False) for _ in range(6)))  # 1 MiB each
    averaging = Averaging(compression="powersgd:1", bucket_bytes=2 << 20, warns_of_copies=False)
    optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model, averaging)
    for _ in range(2):
        world.messages.clear()
        model(torch.ones(1, 512)).sum().backward()
        optimizer.step()
    assert sum(message.num_bytes > 4 for message in world.messages) == 3 + 1
