"""Averaging of gradients, without a launch: ranks are threads, and the sums are real."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from thread_world import run_ranks

from hvdtrain.errors import ConfigError
from hvdtrain.process.launch import Launch
from hvdtrain.world import Averaging, SoloWorld, WrappedOptimizer
from hvdtrain.world.exchange import GradientExchange

SAMPLES = 12


def network(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def data(step, dtype=torch.float64):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(SAMPLES, 6, generator=generator).to(dtype), torch.randint(0, 3, (SAMPLES,), generator=generator)


def share(world, tensor):
    return tensor[world.rank :: world.size]


def train(model, optimizer, steps, of=lambda tensor: tensor):
    for step in range(steps):
        x, y = data(step, next(model.parameters()).dtype)
        optimizer.zero_grad()
        F.cross_entropy(model(of(x)), of(y)).backward()
        optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


def sgd(model, **settings):
    return torch.optim.SGD(model.parameters(), lr=0.1, **settings)


def largest(ours, theirs):
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("bucket_bytes", [100, 1 << 20])
def test_ranks_equal_one_process(size, bucket_bytes):
    def work(world):
        model = network()
        optimizer = world.wrap(sgd(model, momentum=0.9), model, bucket_bytes=bucket_bytes)
        return train(model, optimizer, 5, lambda tensor: share(world, tensor))

    model = network()
    alone = train(model, sgd(model, momentum=0.9), 5)
    ranks = run_ranks(size, work)
    assert largest(ranks[0], alone) < 1e-13
    assert all(torch.equal(a, b) for other in ranks[1:] for a, b in zip(ranks[0], other, strict=True))


def test_buckets_leave_while_backward_runs():
    """From the second step on; in the first, nothing is known of how often backward adds to a gradient."""

    def work(world):
        model = network()
        optimizer = world.wrap(sgd(model), model, bucket_bytes=1)
        early = []
        for step in range(2):
            x, y = data(step)
            optimizer.zero_grad()
            before = len(world.sent)
            seen = []
            model[0].weight.register_hook(lambda g, seen=seen, before=before: seen.append(len(world.sent) - before))
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            early.append(seen[-1])
        return early

    assert run_ranks(2, work) == [[0, 3]] * 2  # the last layer's weight and bias, and the first one's bias


def test_the_users_object_is_the_one_that_averages():
    optimizer = sgd(network())
    wrapped = SoloWorld(torch.device("cpu"), Launch("none")).wrap(optimizer, network())
    assert wrapped is optimizer
    assert isinstance(wrapped, torch.optim.SGD)
    assert isinstance(wrapped, WrappedOptimizer)
    with pytest.raises(ConfigError, match="wrapped already"):
        SoloWorld(torch.device("cpu"), Launch("none")).wrap(optimizer, network())
    with pytest.raises(TypeError, match="state_dict"):
        copy.deepcopy(wrapped)


def test_settings_are_checked_where_they_enter():
    solo, model = SoloWorld(torch.device("cpu"), Launch("none")), network()
    with pytest.raises(ConfigError, match="accum_steps = 0 must be"):
        solo.wrap(sgd(model), model, accum_steps=0)
    with pytest.raises(ConfigError, match=r"bucket_bytes = 2\.5 must be"):
        Averaging(bucket_bytes=2.5)
    with pytest.raises(ConfigError, match="op = 'sum' must be 'average' or 'adasum'"):
        Averaging(op="sum")
    with pytest.raises(ConfigError, match="no compression 'int8': choose none, fp16, bf16"):
        Averaging(compression="int8")
    with pytest.raises(ConfigError, match=r"leave out --comm\.compression"):
        Averaging(op="adasum", compression="fp16")
    with pytest.raises(ConfigError, match="noise-scale needs averaged, dense"):
        Averaging(has_square=True, compression="fp16")
    embedding = torch.nn.Embedding(3, 2, sparse=True)
    with pytest.raises(ConfigError, match="noise-scale needs averaged, dense"):
        solo.wrap(sgd(embedding), embedding, has_square=True)
    assert solo.wrap(sgd(model), model, Averaging(accum_steps=3), accum_steps=4).mean_square is None


def test_a_dropped_optimizer_leaves_nothing_behind():
    """Hooks on the parameters must not keep it, its buckets and its state alive."""

    def work(world):
        model = network()
        optimizer = world.wrap(sgd(model), model)
        train(model, optimizer, 1, lambda tensor: share(world, tensor))
        return model, weakref.ref(optimizer), weakref.ref(optimizer._exchange)

    for model, *weak in run_ranks(2, work):
        gc.collect()
        assert [ref() for ref in weak] == [None, None]
        F.cross_entropy(model(data(0)[0]), data(0)[1]).backward()


def test_sparse_rows_of_some_ranks_only():
    def work(world):
        words = torch.nn.Embedding(10, 3, sparse=True).double()
        torch.nn.init.ones_(words.weight)
        optimizer = world.wrap(sgd(words), words)
        optimizer.zero_grad()
        if world.rank == 0:
            words(torch.tensor([1, 1, 4])).sum().backward()
        optimizer.synchronize()
        gradient = words.weight.grad
        optimizer.step()
        return gradient.is_sparse, gradient.to_dense()[:, 0].tolist(), words.weight[1, 0].item()

    expected = [0.0, 1.0, 0.0, 0.0, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert run_ranks(2, work) == [(True, expected, 0.9)] * 2


def test_what_no_rank_used_keeps_no_gradient():
    def work(world):
        heads = torch.nn.ModuleList(torch.nn.Linear(2, 1) for _ in range(3))
        optimizer = world.wrap(sgd(heads), heads)
        heads[world.rank](torch.ones(1, 2)).sum().backward()
        optimizer.step()
        return [None if head.weight.grad is None else head.weight.grad.tolist() for head in heads]

    assert run_ranks(2, work) == [[[[0.5, 0.5]], [[0.5, 0.5]], None]] * 2


def test_parameters_that_are_not_the_models_have_a_name():
    def work(world):
        model, scale = torch.nn.Linear(2, 1), torch.nn.Parameter(torch.ones(1))
        optimizer = world.wrap(torch.optim.SGD([scale, *model.parameters()], lr=0.1), model, bucket_bytes=1)
        (model(torch.ones(1, 2)) * scale).sum().backward()
        optimizer.step()
        return [name for name in world.sent if name.endswith("parameter 2")]

    assert all(len(names) == 1 for names in run_ranks(2, work))


def test_adasum_gives_each_tensor_undivided():
    def work(world):
        model = network()
        seen = []
        start = world.start_all_reduce_

        def note(tensor, op, name):
            seen.append((op, tensor.clone()))
            return start(tensor, op, name)

        world.start_all_reduce_ = note
        optimizer = world.wrap(sgd(model), model, op="adasum")
        x, y = data(0)
        own = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
        F.cross_entropy(model(x), y).backward()
        optimizer.synchronize()
        return {op for op, _ in seen}, all(torch.equal(a, b[1]) for a, b in zip(own, seen, strict=True))

    assert run_ranks(2, work) == [({"adasum"}, True)] * 2


def test_an_exchange_needs_nothing_but_a_world():
    """The interface that a back end must serve: see `tests/support/thread_world.py`."""

    def work(world):
        weight = torch.nn.Parameter(torch.zeros(2))
        averaging = Averaging()
        exchange = GradientExchange(
            world, "gradients", lambda: [weight], {weight: "weight"}, set(), averaging, averaging.codec()
        )
        (weight * (world.rank + 1)).sum().backward()
        exchange.finish()
        return weight.grad.tolist()

    assert run_ranks(2, work) == [[1.5, 1.5]] * 2
