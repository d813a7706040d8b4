"""Formats of gradients on the wire, and that a codec with a memory or with several rounds fits in."""

import typing

import pytest
import torch
from test_averaging import data, largest, network, sgd, share, train
from thread_world import run_ranks

from hvdtrain.errors import ConfigError
from hvdtrain.settings import CommConfig
from hvdtrain.settings.compression import EXACT
from hvdtrain.world import CODECS, Codec, codec_of

TYPES = [torch.float64, torch.float32, torch.bfloat16]


def test_the_settings_name_all_codecs():
    names, _ = typing.get_args(typing.get_type_hints(CommConfig)["compression"])
    assert tuple(name.partition(":")[0] for name in typing.get_args(names)) == tuple(CODECS)
    with pytest.raises(ConfigError, match="no compression 'fp8'"):
        codec_of("fp8")


def gradients_of(size, compression, value, dtype, adds_bfloat16=False, **fields):
    """Return the mean that each rank is given for the ranks' `value(rank)`."""

    def work(world):
        world.adds_bfloat16 = adds_bfloat16
        layer = torch.nn.Linear(5, 2, bias=False).to(dtype)
        optimizer = world.wrap(sgd(layer), layer, compression=compression, **fields)
        (layer.weight * value(world.rank).to(dtype)).sum().backward()
        optimizer.synchronize()
        return layer.weight.grad

    return run_ranks(size, work)


@pytest.mark.parametrize("adds_bfloat16", [False, True])
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", EXACT)
def test_a_mean_is_within_the_tolerance_and_alike_on_all_ranks(name, dtype, size, adds_bfloat16):
    def value(rank):
        return torch.randn(2, 5, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)

    exact = sum(value(rank).to(dtype).double() for rank in range(size)) / size
    means = gradients_of(size, name, value, dtype, adds_bfloat16)
    assert all(mean.dtype == dtype for mean in means)
    assert all(torch.equal(means[0], mean) for mean in means[1:])
    error = (means[0].double() - exact).abs().max() / exact.abs().max()
    assert error <= codec_of(name).tolerance(dtype)
    if name == "fp16" and dtype != torch.bfloat16:
        assert error > 1e-6  # it is rounded


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_large_gradients_do_not_overflow(name):
    for mean in gradients_of(2, name, lambda rank: torch.full((2, 5), 60000.0), torch.float32):
        assert mean.mean().item() == pytest.approx(60000, rel=4e-3)


def test_bf16_keeps_the_range_of_fp32_and_what_is_not_finite():
    means = gradients_of(2, "bf16", lambda rank: torch.tensor([1e-30, 1e30, torch.inf, torch.nan, 0.0]), torch.float32)
    assert means[0][0, 0] == pytest.approx(1e-30, rel=4e-3)
    assert means[0][0, 1] == pytest.approx(1e30, rel=4e-3)
    assert means[0][0, 2] == torch.inf
    assert means[0][0, 3].isnan()
    assert means[0][0, 4] == 0


@pytest.mark.parametrize("name", ["none", "bf16"])
def test_bfloat16_travels_as_it_is_where_the_world_adds_it_and_is_rounded_once(name):
    """Three ranks: a part that each divides first would be rounded before it is added, too."""

    def value(rank):
        return torch.randn(2, 5, generator=torch.Generator().manual_seed(rank))

    total = sum(value(rank).bfloat16().float() for rank in range(3))
    for mean in gradients_of(3, name, value, torch.bfloat16, adds_bfloat16=True):
        assert torch.equal(mean, (total / 3).bfloat16())


def test_fp32_gradients_as_bfloat16_are_the_same_bits_whoever_adds_them():
    def value(rank):
        return torch.randn(2, 5, generator=torch.Generator().manual_seed(rank))

    own, worlds = (gradients_of(3, "bf16", value, torch.float32, adds_bfloat16=adds) for adds in (False, True))
    assert torch.equal(own[0], worlds[0])


def test_what_needs_more_than_8_bits_and_a_codec_of_another_way_do_not_travel_as_bfloat16():
    class Doubled(type(codec_of("none"))):
        def start(self, world, prefix, name, part):
            assert part.dtype == torch.float32
            wait = super().start(world, prefix, name, part)
            return lambda: wait().mul_(2)

    def ones(rank):
        return torch.ones(2, 5)

    for mean in gradients_of(2, Doubled(), ones, torch.bfloat16, adds_bfloat16=True):
        assert mean.tolist() == [[2.0] * 5] * 2

    def square(world):
        world.adds_bfloat16 = True
        layer = torch.nn.Linear(5, 2, bias=False).bfloat16()
        optimizer = world.wrap(sgd(layer), layer, has_square=True)
        (layer.weight * torch.full((2, 5), 1.0 + 2**-7)).sum().backward()
        optimizer.synchronize()
        return float(optimizer.mean_square)

    assert run_ranks(2, square) == pytest.approx([10 * (1 + 2**-7) ** 2] * 2, rel=1e-6)


@pytest.mark.parametrize("yes", [0, 1, 3])
def test_a_question_travels_with_bfloat16(yes):
    def work(world):
        world.adds_bfloat16 = True
        layer = torch.nn.Linear(5, 2, bias=False).bfloat16()
        optimizer = world.wrap(sgd(layer), layer)
        optimizer.question.ask(world.rank < yes)
        if world.rank:
            layer.weight.sum().backward()
        optimizer.synchronize()
        return optimizer.question.answer, layer.weight.grad.float().mean().item()

    assert run_ranks(3, work) == [(yes > 0, pytest.approx(2 / 3, rel=4e-3))] * 3


def test_bytes():
    assert [codec_of(name).wire_bytes(10, torch.float32) for name in EXACT] == [40, 20, 20]
    assert [codec_of(name).wire_bytes(10, torch.bfloat16) for name in EXACT] == [40, 20, 20]
    assert [codec_of(name).wire_bytes(10, torch.float64) for name in EXACT] == [80, 20, 20]


class Signs(Codec):
    """1-bit gradients with error feedback (arXiv:1901.09847, algorithm 1): sign times mean size; the rest is kept."""

    name = "signs"
    is_elementwise = False

    def __init__(self):
        self.residuals = {}

    def buffer_type(self, dtype):
        return dtype

    def wire_bytes(self, count, dtype):
        return count // 8

    def tolerance(self, dtype):
        return 1.0

    def encode(self, name, part):
        whole = part + self.residuals.get(name, 0)
        sent = whole.sign() * whole.abs().mean()
        self.residuals[name] = whole - sent
        return sent

    def state_dict(self):
        return {name: residual.clone() for name, residual in self.residuals.items()}

    def load_state_dict(self, state):
        self.residuals = dict(state)


def test_a_codec_with_a_memory_fits():
    """Coarse as it is, what is left out of a step comes in the next ones; resumed, it goes on bitwise the same."""

    def work(world):
        model, codec = network(), Signs()
        optimizer = world.wrap(sgd(model), model, compression=codec, bucket_bytes=100)
        of = lambda tensor: share(world, tensor)  # noqa: E731
        train(model, optimizer, 3, of)
        weights, saved = [p.detach().clone() for p in model.parameters()], optimizer.codec.state_dict()
        on = train(model, optimizer, 3, of)
        again, second = network(), Signs()
        with torch.no_grad():
            for parameter, weight in zip(again.parameters(), weights, strict=True):
                parameter.copy_(weight)
        second.load_state_dict(saved)
        resumed = train(again, world.wrap(sgd(again), again, compression=second, bucket_bytes=100), 3, of)
        forgetful = network()
        with torch.no_grad():
            for parameter, weight in zip(forgetful.parameters(), weights, strict=True):
                parameter.copy_(weight)
        third = train(forgetful, world.wrap(sgd(forgetful), forgetful, compression=Signs(), bucket_bytes=100), 3, of)
        return on, resumed, third, len(saved)

    for on, resumed, forgetful, buckets in run_ranks(2, work):
        assert buckets > 1
        assert all(torch.equal(a, b) for a, b in zip(on, resumed, strict=True))
        assert largest(on, forgetful) > 1e-6  # the memory is what was resumed


class RankOne(Codec):
    """A bucket as the product of two vectors, one power iteration (arXiv:1905.13727): two rounds of all-reduce."""

    name = "rank one"
    is_elementwise = False

    def buffer_type(self, dtype):
        return dtype

    def wire_bytes(self, count, dtype):
        return 2 * int(count**0.5) * dtype.itemsize

    def tolerance(self, dtype):
        return 1.0

    def start(self, world, prefix, name, part):
        side = 2
        matrix = part.view(side, -1)
        wait = world.start_all_reduce_(matrix @ matrix.new_ones(matrix.shape[1]), "sum", f"{prefix}.{name}.p")

        def finish():
            p = wait()
            p = p / p.norm()
            q = world.start_all_reduce_(p @ matrix, "sum", f"{prefix}.{name}.q")()
            return torch.outer(p, q).view(-1)

        return finish


def test_a_codec_with_two_rounds_fits():
    """A mean that is of rank one comes through exactly."""

    def value(rank):
        return torch.outer(torch.tensor([1.0, 2.0]), torch.arange(1.0, 6.0)) * (rank + 1)

    for mean in gradients_of(2, RankOne(), value, torch.float64):
        assert torch.allclose(mean, 1.5 * value(0).double(), rtol=1e-12)


def test_training_with_each_codec_stays_near_the_exact_one():
    def work(name):
        def train_so(world):
            model = network(torch.float32)
            optimizer = world.wrap(sgd(model), model, compression=name)
            return train(model, optimizer, 4, lambda tensor: share(world, tensor))

        return train_so

    assert data(0)[0].shape == (12, 6)
    exact = run_ranks(2, work("none"))[0]
    for name in ("fp16", "bf16"):
        ranks = run_ranks(2, work(name))
        assert 0 < largest(ranks[0], exact) < 1e-2
        assert all(torch.equal(a, b) for a, b in zip(*ranks, strict=True))
