"""Gradients that move into the buffers that are sent, and buckets in the order in which backward finishes them."""

import copy

import pytest
import torch
from thread_world import run_ranks
from torch import nn
from torch.utils.checkpoint import checkpoint

from hvdtrain.models.private_torch import LiveBytes

VIEWS = {"gradient_as_bucket_view": True}


class Net(nn.Module):
    """Tied weights, a layer that only some steps use, rows of an embedding, and layers in another order than used."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(8, 20, bias=False)
        self.rare = nn.Linear(8, 8)
        self.table = nn.Embedding(20, 8, sparse=True)
        self.first = nn.Linear(8, 8)
        self.middle = nn.Linear(8, 8)
        self.tied = nn.Embedding(20, 8)
        self.tied.weight = self.last.weight

    def forward(self, tokens, step):
        x = self.first(self.table(tokens) + self.tied(tokens)).tanh()
        x = checkpoint(self.middle, x, use_reentrant=step % 2 == 0)
        x = self.rare(x) if step % 3 == 1 else x
        return self.last(x)


torch.manual_seed(0)
NET = Net()


def tokens_of(step, rank, part):
    return torch.randint(20, (6, 4), generator=torch.Generator().manual_seed(100 * step + 10 * rank + part))


def trained(world, steps=7, accum_steps=1, set_to_none=True, bucket_bytes=900, held=None, **options):
    model = copy.deepcopy(NET)
    options.update(accum_steps=accum_steps, bucket_bytes=bucket_bytes)
    optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model, **options)
    model.middle.bias.requires_grad_(False)
    norms = []
    for step in range(steps):
        if step == 3:
            model.middle.bias.requires_grad_(True)
        optimizer.zero_grad(set_to_none=set_to_none)
        for part in range(accum_steps if world.rank or step != 2 else 0):  # a rank without samples in one of the steps
            logits = model(tokens_of(step, world.rank, part), step)
            (logits.logsumexp(-1).mean() / accum_steps).backward()
        optimizer.synchronize()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if held is not None:
            held.append(([g.to_dense().clone() for g in gradients], [g.to_dense() for g in gradients], gradients))
        norms.append(torch.stack([g.to_dense().norm() for g in gradients]))
        optimizer.step()
    return norms, [p.detach().clone() for p in model.parameters()], optimizer


def assert_equal(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a[0] + a[1], b[0] + b[1], strict=True))


@pytest.mark.parametrize("accum_steps", [1, 3])
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("compression", ["none", "fp16", "bf16", "powersgd:2"])
def test_gradients_are_bitwise_the_same(accum_steps, set_to_none, compression):
    given = {"accum_steps": accum_steps, "set_to_none": set_to_none, "compression": compression}
    with_views = run_ranks(3, lambda world: trained(world, **given, **VIEWS))
    without = run_ranks(3, lambda world: trained(world, **given))
    assert_equal(with_views, without)


def test_what_a_user_holds_stays_what_it_was():
    def work(world):
        held = []
        trained(world, held=held, **VIEWS)
        return [(before, now) for before, now, _ in held]

    for steps in run_ranks(2, work):
        for before, now in steps:
            assert all(torch.equal(a, b) for a, b in zip(before, now, strict=True))


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(8))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("accum_steps", [1, 2])
def test_gradients_are_there_once(accum_steps):
    """The most that lives in a step, over the buffers: one bucket of gradients and what backward has at hand."""
    size = 64 * 64 * 4

    def work(world, **options):
        model = Deep()
        optimizer = world.wrap(
            torch.optim.SGD(model.parameters(), lr=0.1), model, bucket_bytes=size, accum_steps=accum_steps, **options
        )
        peaks = []
        for _ in range(3):
            optimizer.zero_grad()
            with LiveBytes() as live:
                for _ in range(accum_steps):
                    model(torch.ones(2, 64)).sum().backward()
            peaks.append(live.peak / size)
            optimizer.step()
        return peaks

    # ThreadWorld copies each bucket that it sends: what lives then is the same in both.
    assert all(peak > 8 for peak in run_ranks(2, work)[0])
    mine = run_ranks(2, lambda world: work(world, **VIEWS))[0]
    sent = 8 * (size + 8) / size  # ThreadWorld's copies
    assert all(peak < sent + 3.5 for peak in mine), mine


class Joined(nn.Module):
    """Weights that are put together for one product, whose gradient is one tensor: each `.grad` is a part of it."""

    def __init__(self, times):
        super().__init__()
        self.times = times
        self.layers = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(12))

    def forward(self, x):
        for start in range(0, 12, self.times):
            weights = [layer.weight for layer in self.layers[start : start + self.times]]
            x = nn.functional.linear(x, torch.cat(weights)).unflatten(-1, (-1, 64)).mean(-2)
        return x


@pytest.mark.parametrize("times", [2, 3])
@pytest.mark.parametrize("in_bucket", [1, 2, 12])
def test_gradients_of_joined_weights_move_too(times, in_bucket):
    """Also where a bucket ends between them; what a user holds of them stays."""
    size, joined = 64 * 64 * 4, Joined(times)

    def work(world, keeps=False, **options):
        model = copy.deepcopy(joined)
        x = torch.randn(2, 64, generator=torch.Generator().manual_seed(world.rank))
        optimizer = world.wrap(
            torch.optim.SGD(model.parameters(), lr=0.1), model, bucket_bytes=in_bucket * size, **options
        )
        peaks, held = [], []
        for _ in range(3):
            optimizer.zero_grad()
            with LiveBytes() as live:
                model(x).square().mean().backward()
            peaks.append(live.peak / size)
            parts = {layer.weight.grad.untyped_storage().data_ptr() for layer in model.layers}
            if keeps:
                held.append((model.layers[4].weight.grad, model.layers[4].weight.grad.clone()))
            optimizer.step()
        return max(peaks[1:]), len(parts), [p.detach() for p in model.parameters()], held

    plain, views = run_ranks(2, work)[0], run_ranks(2, lambda world: work(world, **VIEWS))[0]
    assert all(map(torch.equal, plain[2], views[2]))
    assert all(torch.equal(a, b) for a, b in run_ranks(2, lambda world: work(world, True, **VIEWS))[0][3])
    buckets = -(-12 // in_bucket)
    assert plain[1] == views[1] == buckets  # they are parts of the buffers, not of the products' gradients
    sent = 12 + buckets * 0.01  # ThreadWorld's copies, and each bucket's counts
    assert plain[0] > sent + 12 - 0.1
    if in_bucket < 12:  # ThreadWorld adds up a whole bucket at a time
        assert views[0] < sent + in_bucket + times + 2.5


def test_channels_last_gradients_lie_in_the_buckets_too():
    """So are models of images on GPUs: each of their gradients was kept twice, and copied by itself."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1)).to(
        memory_format=torch.channels_last
    )

    def work(world, **options):
        model = copy.deepcopy(net)
        optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model, **options)
        found = []
        for step in range(3):
            optimizer.zero_grad()
            x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(10 * step + world.rank))
            model(x.contiguous(memory_format=torch.channels_last)).square().mean().backward()
            for parameter in model.parameters():
                assert parameter.grad.stride() == parameter.stride()
                assert parameter.grad.untyped_storage().nbytes() > parameter.grad.nbytes
            kept = model[0].weight.grad
            found += [kept.clone()]
            optimizer.step()
            optimizer.zero_grad()
            assert torch.equal(kept, found[-1])
        return found + [parameter.detach().clone() for parameter in model.parameters()]

    ways = [run_ranks(2, lambda world, options=options: work(world, **options)) for options in ({}, VIEWS)]
    assert all(map(torch.equal, ways[0][0], ways[1][0]))
    assert all(map(torch.equal, ways[1][0], ways[1][1]))


def test_a_gradient_that_is_changed_on_the_wire_is_refused():
    def work(world):
        model = Deep()
        optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model, bucket_bytes=1, **VIEWS)
        model.layers[0].weight.register_post_accumulate_grad_hook(
            lambda p: (model.layers[5].weight.grad.mul_(2), None)[1]
        )
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.ones(2, 64)).sum().backward()
            optimizer.step()

    with pytest.raises(RuntimeError, match="changed while it was on the wire"):
        run_ranks(2, work)


def order_of(optimizer):
    return [list(bucket.parameters) for bucket in optimizer._exchange.layout.buckets]


def test_buckets_follow_backward_from_the_second_step_on():
    def work(world):
        model = copy.deepcopy(NET)
        optimizer = world.wrap(
            torch.optim.SGD(model.parameters(), lr=0.1), model, bucket_bytes=1, follows_backward=True
        )
        names = {parameter: name for name, parameter in model.named_parameters()}
        before = [names[p] for (p,) in order_of(optimizer)]
        for step in range(2):
            optimizer.zero_grad()
            model(tokens_of(step, world.rank, 0), 1).sum().backward()
            optimizer.step()
        return before, [names[p] for (p,) in order_of(optimizer)], optimizer.bucket_order

    results = run_ranks(3, work)
    assert all(result == results[0] for result in results)
    before, after, order = results[0]
    middle_to_first = ["rare.bias", "rare.weight", "middle.bias", "middle.weight", "first.bias", "first.weight"]
    assert [name for name in after if "." in name and not name.startswith("last")] == middle_to_first
    assert after[-1] == "last.weight"  # tied to the embedding, which is computed last
    assert after != before
    assert sorted(order) == sorted(after)


def test_a_run_that_goes_on_with_its_order_is_bitwise_the_same():
    def work(world, stop=None, known=None):
        model = copy.deepcopy(NET)
        optimizer = world.wrap(
            torch.optim.SGD(model.parameters(), lr=0.1), model, bucket_bytes=900, follows_backward=True
        )
        if known is not None:
            model.load_state_dict(known[0])
            optimizer.bucket_order = known[1]
        for step in range(0 if known is None else 2, 5 if stop is None else stop):
            optimizer.zero_grad()
            model(tokens_of(step, world.rank, 0), 1).sum().backward()
            optimizer.step()
        return {k: v.clone() for k, v in model.state_dict().items()}, optimizer.bucket_order

    whole = run_ranks(3, work)[0][0]
    known = run_ranks(3, lambda world: work(world, stop=2))[0]
    again = run_ranks(3, lambda world: work(world, known=known))[0][0]
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_an_order_is_learned_later_where_rank_0_had_no_sample():
    def work(world):
        model = copy.deepcopy(NET)
        optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model, follows_backward=True)
        known = []
        for step in range(2):
            optimizer.zero_grad()
            if world.rank or step:
                model(tokens_of(step, world.rank, 0), 1).sum().backward()
            optimizer.step()
            known.append(len(optimizer.bucket_order))
        return known

    assert run_ranks(2, work) == [[0, 7], [0, 7]]
