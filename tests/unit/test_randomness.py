"""Random numbers belong to samples: they do not depend on how a global batch is cut into micro-batches."""

import random
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from waiting_copies import Copies

from hvdtrain.models.private_torch import is_freshly_seeded
from hvdtrain.trainer import random_attention
from hvdtrain.trainer.randomness import MicroBatchRandomness, SampleRandomness, one_by_one

CPU = torch.device("cpu")
SPLITS = {"whole": [6], "uneven": [2, 3, 1], "single": [1] * 6}


class Layers(nn.Module):
    """Every kind of random number that a model may draw."""

    def __init__(self):
        super().__init__()
        self.block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.3, batch_first=True)
        self.channels = nn.Dropout1d(0.4)
        self.linear = nn.Linear(16, 16)

    def forward(self, x):
        x = self.block(x)
        x = x * (torch.rand(len(x)) > 0.3)[:, None, None] + torch.randn_like(x)
        x = x + torch.empty_like(x).bernoulli_(0.3) + torch.zeros_like(x).normal_(1.0, 2.0)
        heads = x[:, None]
        x = F.scaled_dot_product_attention(heads, heads, heads, dropout_p=0.2, is_causal=True)[:, 0]
        return self.channels(checkpoint(lambda y: F.dropout(self.linear(y), 0.5), x, use_reentrant=False))


def run(model, x, sizes, *place):
    """Return outputs and gradients of a batch, cut into micro-batches of these sizes."""
    model.zero_grad()
    outputs = []

    def backward(output):
        output.square().sum().backward()
        outputs.append(output.detach())

    randomness = MicroBatchRandomness(CPU)
    for positions in torch.arange(len(x)).split(sizes):
        randomness.run(positions, place, lambda positions=positions: model(x[positions]), backward)
    return torch.cat(outputs), [p.grad.clone() for p in model.parameters()]


def test_micro_batches_draw_what_the_whole_batch_draws():
    torch.manual_seed(0)
    model, x = Layers().double(), torch.randn(6, 5, 16).double()
    whole, gradients = run(model, x, SPLITS["whole"], 1, 2)
    for sizes in SPLITS.values():
        output, own = run(model, x, sizes, 1, 2)
        assert (output - whole).abs().max() < 1e-12
        assert max((a - b).abs().max() for a, b in zip(own, gradients, strict=True)) < 1e-9
    other, _ = run(model, x, SPLITS["whole"], 1, 3)
    assert (other - whole).abs().max() > 0.1  # another step, other numbers


def test_what_is_computed_again_draws_the_same():
    """Activation checkpoints run their part twice, with other parts' draws between: the gradient is the same."""
    x = torch.randn(6, 20, generator=torch.Generator().manual_seed(0))
    gradients = []
    for keep in (lambda part, y: part(y), lambda part, y: checkpoint(part, y, use_reentrant=False)):
        y = x.clone().requires_grad_()

        def forward(y=y, keep=keep):
            for _ in range(3):
                y = keep(lambda z: F.dropout(z * 1.5, 0.5) + torch.rand(()), y)
            return y

        MicroBatchRandomness(CPU).run(torch.arange(6), (0, 1), forward, lambda out: out.square().sum().backward())
        gradients.append(y.grad)
    assert gradients[0].equal(gradients[1])


def test_samples_differ_and_numbers_are_uniform():
    torch.manual_seed(0)
    with SampleRandomness(torch.arange(64)):
        u, again, normal = torch.rand(64, 5000), torch.rand(64, 5000), torch.randn(64, 5000)
        dropped = F.dropout(torch.ones(64, 5000), 0.1)
    assert u.mean().item() == pytest.approx(0.5, abs=0.003)
    assert u.var().item() == pytest.approx(1 / 12, abs=0.001)
    assert (normal.mean().item(), normal.std().item()) == pytest.approx((0, 1), abs=0.01)
    assert (dropped == 0).float().mean().item() == pytest.approx(0.1, abs=0.003)
    assert dropped.max().item() == pytest.approx(1 / 0.9)
    correlations = torch.corrcoef(torch.cat((u, again))) - torch.eye(128)
    assert correlations.abs().max() < 0.09  # 5 sigma and more of 1/sqrt(5000)
    assert u.unique().numel() > 0.98 * u.numel()


def test_a_model_that_draws_nothing_is_left_alone_until_it_does():
    randomness = MicroBatchRandomness(CPU)
    calls = []

    def forward(draws):
        calls.append(torch.overrides._get_current_function_mode() is not None)
        return torch.rand(3) if draws else None

    positions = torch.arange(3)
    for draws in (False, False, True, True):
        randomness.run(positions, (0, 1), lambda draws=draws: forward(draws), lambda _: None)
    assert calls == [True, False, False, True, True]  # the third is computed again, with its own numbers


def by_parts(draw, sizes):
    """Return what six samples draw, cut into micro-batches of these sizes."""
    parts = []
    for positions in torch.arange(6).split(sizes):
        MicroBatchRandomness(CPU).run(positions, (5, 1), partial(draw, len(positions)), parts.append)
    return torch.cat(parts)


def gamma(n):
    return torch.distributions.Gamma(torch.ones(n, 3), 1.0).sample()


BY_SAMPLE = {
    "randint": lambda n: torch.randint(0, 1000, (n,)),
    "randint to a bound": lambda n: torch.randint(1000, (n, 2)),
    "randint by names": lambda n: torch.randint(low=5, high=1000, size=(n,)),
    "rand by names": lambda n: torch.rand(size=(n, 2), generator=None, requires_grad=False, layout=torch.strided),
    "randn of a numpy number": lambda n: torch.randn(np.int64(n), 2),
    "randn to be differentiated": lambda n: torch.randn(n, 2, requires_grad=True).detach(),
    "randn_like": lambda n: torch.randn_like(torch.zeros(n, 2), memory_format=torch.preserve_format),
    "randint without a generator": lambda n: torch.randint(0, 1000, (n, 2), generator=None),
    "normal by names": lambda n: torch.normal(mean=0.0, std=1.0, size=(n, 3), generator=None),
    "uniform_ by names": lambda n: torch.zeros(n, 3).uniform_(**{"from": 2.0, "to": 3.0}),
    "random_ by names": lambda n: torch.zeros(n, 3).random_(**{"from": 2, "to": 1000}),
    "complex rand": lambda n: torch.view_as_real(torch.rand(n, 3, dtype=torch.complex64)),
    "complex randn_like": lambda n: torch.view_as_real(torch.randn_like(torch.zeros(n, 3, dtype=torch.complex128))),
    "complex normal_": lambda n: torch.view_as_real(torch.zeros(n, 3, dtype=torch.complex64).normal_()),
    "torch.dropout": lambda n: torch.dropout(torch.ones(n, 99), 0.5, train=True),
    "torch.dropout_": lambda n: torch.dropout_(torch.ones(n, 99), 0.5, True),
    "torch.native_dropout": lambda n: torch.native_dropout(torch.ones(n, 99), 0.5, True)[0],
    "torch.alpha_dropout": lambda n: torch.alpha_dropout(torch.ones(n, 99), 0.5, True),
    "torch.feature_dropout": lambda n: torch.feature_dropout(torch.ones(n, 99, 2), 0.5, True),
    "torch.rrelu": lambda n: torch.rrelu(-torch.ones(n, 5), training=True),
    "rrelu_": lambda n: F.rrelu_(-torch.ones(n, 5), training=True),
    "randint_like": lambda n: torch.randint_like(torch.zeros(n, 2), 1000),
    "random_": lambda n: torch.empty(n, 3).random_(0, 1000),
    "normal of tensors": lambda n: torch.normal(torch.zeros(n, 3), torch.ones(n, 3)),
    "normal of a size": lambda n: torch.normal(0.0, 1.0, (n, 3)),
    "exponential_": lambda n: torch.empty(n, 3).exponential_(),
    "cauchy_": lambda n: torch.empty(n, 3).cauchy_(),
    "log_normal_": lambda n: torch.empty(n, 3).log_normal_(),
    "geometric_": lambda n: torch.empty(n, 9).geometric_(0.01),
    "multinomial": lambda n: torch.multinomial(torch.ones(n, 500), 3),
    "multinomial with replacement": lambda n: torch.ones(n, 500).multinomial(3, replacement=True),
    "gumbel_softmax": lambda n: F.gumbel_softmax(torch.zeros(n, 5)),
    "hard gumbel_softmax": lambda n: F.gumbel_softmax(torch.zeros(n, 500), hard=True).argmax(1),
    "rrelu": lambda n: F.rrelu(-torch.ones(n, 5), training=True),
    "alpha_dropout": lambda n: F.alpha_dropout(torch.ones(n, 99), 0.5, training=True),
    "feature_alpha_dropout": lambda n: F.feature_alpha_dropout(torch.ones(n, 99, 2), 0.5, training=True),
    "Normal": lambda n: torch.distributions.Normal(torch.zeros(n, 2), 1.0).rsample(),
    "Categorical": lambda n: torch.distributions.Categorical(torch.ones(n, 9999)).sample(),
    "Gumbel": lambda n: torch.distributions.Gumbel(torch.zeros(n, 2), 1.0).sample(),
    "Exponential": lambda n: torch.distributions.Exponential(torch.ones(n, 2)).sample(),
    "Laplace": lambda n: torch.distributions.Laplace(torch.zeros(n, 2), 1.0).sample(),
}
BY_MICRO_BATCH = {
    "rand of no samples": lambda n: torch.rand(7)[None].expand(n, 7),
    "randperm": lambda n: torch.randperm(1000)[:n],
    "Gamma": gamma,
    "LSTM": lambda n: nn.LSTM(4, 4, 2, dropout=0.5, batch_first=True)(torch.ones(n, 3, 4))[0].detach(),
    "numpy": lambda n: torch.from_numpy(np.random.rand(n, 2)),
    "Python": lambda n: torch.tensor([random.random() for _ in range(n)]),
    "a sample after the other": lambda n: torch.stack([torch.rand(9) for _ in range(n)]),
}


@pytest.mark.parametrize("name", BY_SAMPLE)
def test_samples_draw_their_own_numbers_in_any_micro_batch(name):
    whole = by_parts(BY_SAMPLE[name], SPLITS["whole"])
    assert len({str(row) for row in whole.tolist()}) == 6
    for sizes in SPLITS.values():
        assert by_parts(BY_SAMPLE[name], sizes).equal(whole)


@pytest.mark.parametrize("name", [name for name in BY_SAMPLE if name[0].islower()] + ["what drops a layer"])
def test_nobody_waits_for_the_device_on_which_numbers_are_drawn(name):
    """Here a device whose numbers nobody can look at, which is also torch's default one."""
    device = torch.device("meta")
    draw = BY_SAMPLE.get(name, lambda n: torch.rand(()) + torch.rand((), device=device))
    with device, SampleRandomness(torch.arange(6, device="cpu"), 1), Copies() as copies:
        assert draw(6).is_meta
    assert copies.found == []
    assert copies.num_others > 0


@pytest.mark.parametrize("name", BY_MICRO_BATCH)
def test_what_knows_no_samples_differs_in_every_micro_batch(name):
    draw = BY_MICRO_BATCH[name]
    torch.manual_seed(0)
    drawn = by_parts(draw, SPLITS["single"])
    assert len({str(row) for row in drawn.tolist()}) == 6
    assert by_parts(draw, SPLITS["single"]).equal(drawn) or name == "LSTM"  # of other weights each time


DISTRIBUTIONS = {
    "randint": (lambda n: torch.randint(3, 8, (n, 2000)).double(), stats.randint(3, 8)),
    "exponential_": (lambda n: torch.empty(n, 2000).exponential_(2.0), stats.expon(scale=0.5)),
    "cauchy_": (lambda n: torch.empty(n, 2000).cauchy_(1.0, 2.0), stats.cauchy(1.0, 2.0)),
    "log_normal_": (lambda n: torch.empty(n, 2000).log_normal_(0.5, 0.3), stats.lognorm(0.3, scale=np.exp(0.5))),
    "geometric_": (lambda n: torch.empty(n, 2000).geometric_(0.3), stats.geom(0.3)),
    "normal": (lambda n: torch.normal(1.0, 2.0, (n, 2000)), stats.norm(1.0, 2.0)),
    "uniform_ by names": (
        lambda n: torch.zeros(n, 2000).uniform_(**{"from": 2.0, "to": 5.0}).double(),
        stats.uniform(2.0, 3.0),
    ),
    "complex randn": (
        lambda n: torch.view_as_real(torch.randn(n, 1000, dtype=torch.complex64)).flatten(1),
        stats.norm(0.0, 0.5**0.5),
    ),
    "complex normal_": (
        lambda n: torch.view_as_real(torch.zeros(n, 1000, dtype=torch.complex128).normal_(std=2.0)).flatten(1),
        stats.norm(0.0, 2 * 0.5**0.5),
    ),
    "multinomial": (
        lambda n: torch.multinomial(torch.tensor([0.2, 0.0, 0.5, 0.3]).expand(n, 4), 2000, True).double(),
        stats.rv_discrete(values=([0, 1, 2, 3], [0.2, 0.0, 0.5, 0.3])),
    ),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_distributions_are_the_right_ones(name):
    draw, expected = DISTRIBUTIONS[name]
    values = by_parts(draw, [6]).flatten().double().numpy()
    for q in np.unique(expected.ppf([0.1, 0.3, 0.5, 0.7, 0.9])):
        assert (values <= q).mean() == pytest.approx(expected.cdf(q), abs=0.025)  # 5 sigma of 12,000


def test_multinomial_without_replacement_draws_each_once_by_weight():
    weights = torch.tensor([0.6, 0.3, 0.1, 0.0])
    drawn = by_parts(lambda n: torch.multinomial(weights.expand(n * 1000, 4)[:n], 3), [6])
    assert all(sorted(row) == [0, 1, 2] for row in drawn.tolist())
    with SampleRandomness(torch.arange(3000)):
        first = torch.multinomial(weights.expand(3000, 4), 2)[:, 0]
    assert (first == 0).float().mean().item() == pytest.approx(0.6, abs=0.05)


def test_a_generator_that_is_given_is_asked():
    with SampleRandomness(torch.arange(4)):
        own = torch.randint(1000, (4,), generator=torch.Generator().manual_seed(3))
    assert own.equal(torch.randint(1000, (4,), generator=torch.Generator().manual_seed(3)))


def test_a_place_for_the_result_is_filled():
    place = torch.full((4, 99), 7.0)
    with SampleRandomness(torch.arange(4)):
        torch.bernoulli(torch.full((4, 99), 0.5), out=place)
        noise = torch.rand_like(torch.zeros(4, 2), requires_grad=True)
    assert set(place.flatten().tolist()) == {0.0, 1.0}
    assert noise.requires_grad


def test_what_is_drawn_is_found_out():
    def observed(draw):
        randomness = MicroBatchRandomness(CPU, is_observed=True)
        randomness.run(torch.arange(4), (0, 1), draw, lambda _: None)
        return randomness.is_by_sample, randomness.by_micro_batch

    assert observed(lambda: torch.ones(4)) == (False, set())
    assert observed(lambda: torch.rand(4)) == (True, set())
    assert observed(lambda: torch.rand(7)) == (False, {"torch"})
    assert observed(lambda: (torch.rand(4), torch.randperm(7), random.random())) == (True, {"torch", "Python"})
    assert observed(lambda: np.random.rand()) == (False, {"numpy"})


@pytest.mark.parametrize("draws", [0, 1, 623, 624, 625, 1248])
def test_any_number_of_draws_tells_a_generator_from_one_that_was_just_seeded(draws):
    generator = torch.Generator().manual_seed(2**62 + 5)
    for _ in range(draws):
        torch.randint(2**20, (), generator=generator)
    assert is_freshly_seeded(generator, 2**62 + 5) == (draws == 0)
    assert not is_freshly_seeded(generator.manual_seed(1), 2)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_multi_head_attention_drops_by_sample(need_weights, batch_first):
    """With weights asked for, torch makes heads and samples one dimension."""
    torch.manual_seed(0)
    layer = torch.nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=batch_first)
    x = torch.randn(6, 5, 8)

    def attended(samples):
        own = x[samples] if batch_first else x[samples].transpose(0, 1)
        with SampleRandomness(samples, 3):
            out, _ = layer(own, own, own, need_weights=need_weights)
        return out if batch_first else out.transpose(0, 1)

    samples = torch.arange(6)
    whole = attended(samples)
    for part in (samples[:2], samples[2:3], samples[3:]):
        torch.testing.assert_close(attended(part), whole[part])
    assert not torch.allclose(whole, layer.eval()(x, x, x)[0]) or not batch_first


def test_attention_sample_by_sample_is_its_own_and_leaves_the_generator_alone():
    """What GPUs are given where flash attention drops weights; CPUs drop them by plain steps of theirs."""
    q = torch.randn(4, 2, 8, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    mode = SampleRandomness(torch.arange(4), 3)
    seeds = mode.next_seeds(q.shape)
    assert len(set(seeds)) == 4
    assert SampleRandomness(torch.arange(2, 4), 3).next_seeds(q[2:].shape) == seeds[2:]
    assert mode.next_seeds((3, 2, 8, 16)) is None
    torch.manual_seed(7)
    before = torch.get_rng_state()
    random_attention.one_by_one(seeds, q, q, q, is_causal=True).sum().backward()
    plain = torch.nn.functional.scaled_dot_product_attention(q.detach(), q.detach(), q.detach(), is_causal=True)
    assert torch.equal(before, torch.get_rng_state())
    torch.testing.assert_close(random_attention.one_by_one(seeds, q, q, q, is_causal=True), plain)


class Alone(nn.Module):
    """Has samples pass one at a time where it is told to, and hands out attention's weights; a part is checkpointed."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, dropout=0.4, batch_first=True)
        self.linear = nn.Linear(16, 16)
        self.is_alone = True

    def forward(self, x):
        return torch.cat([self.of(x[i : i + 1]) for i in one_by_one(len(x))]) if self.is_alone else self.of(x)

    def of(self, x):
        x = self.attention(x, x, x, need_weights=True)[0] * (1 + torch.rand([]))
        return checkpoint(lambda y: F.dropout(self.linear(y), 0.5), x, use_reentrant=False)


def test_samples_that_pass_one_at_a_time_draw_the_same():
    torch.manual_seed(0)
    model, x = Alone().double(), torch.randn(6, 5, 16).double()
    whole, gradients = run(model, x, SPLITS["whole"], 1, 2)
    assert not torch.allclose(whole, run(model, x, SPLITS["whole"], 1, 3)[0])
    for model.is_alone in (True, False):
        for sizes in SPLITS.values():
            output, own = run(model, x, sizes, 1, 2)
            assert (output - whole).abs().max() < 1e-12
            for a, b in zip(own, gradients, strict=True):
                assert (a - b).abs().max() < 1e-11
    assert list(one_by_one(3)) == [0, 1, 2]  # outside of micro-batches


def test_what_gradient_hooks_draw_is_for_no_sample():
    """As PowerSGD's first matrix, from one seed on all ranks: verify told the user to mend a generator of theirs."""
    weight = nn.Parameter(torch.ones(2))

    def drawn(seed):
        return torch.randn(2, generator=torch.Generator().manual_seed(seed))

    weight.register_hook(lambda gradient: gradient + drawn(0))
    randomness = MicroBatchRandomness(CPU, is_observed=True)
    for step in range(2):
        randomness.run(torch.arange(4), (0, step), lambda seed=step: (weight * drawn(seed)).sum(), Tensor.backward)
    assert [name for name, _ in randomness.own_draws] == ["randn", "randn"]
    assert len({*randomness.own_draws}) == 2
