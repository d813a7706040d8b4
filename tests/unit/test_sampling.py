"""Sampling from models whose distribution is known, and from a decoder with and without its cache."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hvdtrain.errors import ConfigError, DivergedError
from hvdtrain.models import one_token
from hvdtrain.models.config import DecoderConfig
from hvdtrain.models.decoder import Decoder
from hvdtrain.models.sampling import Sampling, draw, sample

PROBABILITIES = torch.tensor([0.5, 0.3, 0.15, 0.05])


class Fixed(nn.Module):
    """Always the same distribution; remembers what it was shown since its cache was new."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(PROBABILITIES.log() + 3.0)
        self.seen: list[list[int]] = []
        self.modes: set[tuple[bool, bool]] = set()

    def new_cache(self, padding: Tensor, max_length: int, reuse: object = None) -> list[int]:
        return []

    def forward(self, tokens: Tensor, cache: list[int]) -> Tensor:
        cache += tokens[0].tolist()
        self.seen.append(list(cache))
        self.modes.add((self.training, torch.is_grad_enabled()))
        return self.logits.expand(*tokens.shape, -1)


def continue_one(model: Any, prompt: Sequence[int], num_tokens: int, **settings: Any) -> list[int]:
    how = {key: settings.pop(key) for key in ("temperature", "top_k", "top_p", "seed") if key in settings}
    given = {"context_length": 4, "sampling": Sampling(**how), **settings}
    return [token for (token,) in sample(model, [prompt], num_tokens, **given) if token is not None]


def frequencies(tokens: list[int]) -> list[float]:
    counts = Counter(tokens)
    return [counts[token] / len(tokens) for token in range(4)]


def test_tokens_come_with_their_probabilities() -> None:
    tokens = continue_one(Fixed(), [0], 4000, temperature=1.0)
    assert frequencies(tokens) == pytest.approx(PROBABILITIES.tolist(), abs=0.03)


def test_temperature_sharpens() -> None:
    tokens = continue_one(Fixed(), [0], 4000, temperature=0.5)
    expected = PROBABILITIES.square() / PROBABILITIES.square().sum()
    assert frequencies(tokens) == pytest.approx(expected.tolist(), abs=0.03)


def test_temperature_zero_takes_the_likeliest() -> None:
    assert continue_one(Fixed(), [3], 5, temperature=0) == [0] * 5


def test_top_k_leaves_out_the_rest() -> None:
    tokens = continue_one(Fixed(), [0], 4000, temperature=1.0, top_k=2)
    assert frequencies(tokens) == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)
    assert 3 in continue_one(Fixed(), [0], 500, temperature=1.0, top_k=99)


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.4, [1, 0, 0, 0]), (0.6, [0.625, 0.375, 0, 0]), (1.0, [0.5, 0.3, 0.15, 0.05])]
)
def test_top_p_keeps_the_likeliest_that_reach_it(top_p: float, kept: list[float]) -> None:
    tokens = continue_one(Fixed(), [0], 4000, temperature=1.0, top_p=top_p)
    assert frequencies(tokens) == pytest.approx(kept, abs=0.03)


def test_the_model_sees_the_newest_tokens_in_order() -> None:
    model = Fixed()
    new = continue_one(model, [3, 2, 1], 4)
    # Where a fifth token would come, the older half is dropped.
    assert model.seen == [[3, 2, 1], [3, 2, 1, new[0]], [new[0], new[1]], [new[0], new[1], new[2]]]


def test_seed_decides_and_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = continue_one(Fixed(), [0], 50, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert continue_one(Fixed(), [0], 50, seed=1) == first
    assert continue_one(Fixed(), [0], 50, seed=2) != first


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_and_gradients_are_off_only_meanwhile(training: bool) -> None:
    model = Fixed().train(training)
    continue_one(model, [0], 2)
    assert model.modes == {(False, False)}
    assert model.training is training
    model.logits.data = model.logits.data * float("nan")
    with pytest.raises(DivergedError, match="logits are not finite"):
        continue_one(model, [0], 2)
    assert model.training is training


def decoder(**settings: Any) -> Decoder:
    config = DecoderConfig(num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=2, **settings)
    model = Decoder(config, 20, seed=1).double()
    with torch.no_grad():  # far from uniform, so that what was read matters
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11, 12, 13], list(range(20))]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_cache_changes_nothing(temperature: float) -> None:
    """Also beyond the context, where half of it is dropped."""
    model, sampling = decoder(), Sampling(temperature=temperature)
    with_cache, without = (
        list(sample(model, PROMPTS, 40, context_length=12, sampling=sampling, use_cache=use)) for use in (True, False)
    )
    assert with_cache == without
    assert len({tuple(step) for step in with_cache}) > 3


def test_a_prompt_is_continued_alike_alone_and_among_others() -> None:
    model = decoder()
    together = list(sample(model, PROMPTS, 30, context_length=12, sampling=Sampling(temperature=0)))
    for i, prompt in enumerate(PROMPTS):
        assert [step[i] for step in together] == continue_one(model, prompt, 30, context_length=12, temperature=0)


def test_logits_with_a_cache_are_those_of_one_pass() -> None:
    model, tokens = decoder(), torch.tensor([[1, 2, 3, 4, 5, 6, 7]])
    cache = model.new_cache(torch.tensor([0]), 8)
    parts = [model(tokens[:, :3], cache=cache), model(tokens[:, 3:4], cache=cache), model(tokens[:, 4:], cache=cache)]
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens))


SHAPES = {
    "one head": {"num_heads": 1},
    "grouped": {"num_heads": 4, "num_kv_heads": 2, "norm_eps": 0.3},
    "one key head, untied": {"num_heads": 4, "num_kv_heads": 1, "tie_embeddings": False},
    "wide": {"num_heads": 4, "intermediate_size": 80, "rope_theta": 50.0},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_tokens_read_one_by_one_have_the_logits_of_one_pass(shape: str) -> None:
    """Rows of unequal length, over several rooms of the cache, with longer parts in between."""
    model = Decoder(DecoderConfig(num_layers=2, hidden_size=32, **SHAPES[shape]), 20, seed=1)
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(20, (3, 90), generator=generator)
    padding = torch.tensor([0, 5, 1])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) / 5)
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
            model.to(dtype)
            cache = model.new_cache(padding, 90)
            bounds = [0, 9, *range(10, 60), 65, *range(66, 91)]
            parts = [model(tokens[:, a:b], cache=cache) for a, b in itertools.pairwise(bounds)]
            assert cache.one_token is not None
            for row, pad in enumerate(padding.tolist()):
                logits = torch.cat(parts, 1)[row, pad:]
                expected = model(tokens[row : row + 1, pad:])[0]
                assert (logits - expected).abs().max() < tolerance * expected.abs().max()


def test_a_cache_that_is_used_again_is_as_a_new_one() -> None:
    model, tokens = decoder(), torch.arange(14).view(2, 7)
    cache = None
    with torch.no_grad():
        for padding, bounds in (([0, 2], (0, 4, 5, 6)), ([1, 0], (0, 6, 7))):
            fresh = model.new_cache(torch.tensor(padding), 9)
            cache = model.new_cache(torch.tensor(padding), 9, cache)
            for start, end in itertools.pairwise(bounds):
                part = tokens[:, start:end]
                assert torch.equal(model(part, cache=cache), model(part, cache=fresh))


def test_greedy_tokens_are_those_of_the_plain_forward_pass() -> None:
    model = decoder().float()
    prompt = [3, 1, 4]
    said = continue_one(model, prompt, 60, context_length=63, temperature=0)
    with torch.no_grad():
        assert said == model(torch.tensor([prompt + said]))[0, 2:-1].argmax(-1).tolist()
    assert len(set(said)) > 3


@pytest.mark.parametrize("kind", [torch.bfloat16, "large"])
def test_what_is_not_read_one_by_one_says_the_same(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = decoder()
    expected = list(sample(model, PROMPTS, 30, context_length=12, sampling=Sampling(temperature=0)))
    if kind == "large":
        monkeypatch.setattr(one_token, "_MOST_PACKED_BYTES", 0)
    else:
        model = model.to(kind)
    with torch.no_grad():
        cache = model.new_cache(torch.tensor([0]), 8)
        for token in (1, 2):
            model(torch.tensor([[token]]), cache=cache)
    assert cache.one_token is None
    said = list(sample(model, PROMPTS, 30, context_length=12, sampling=Sampling(temperature=0)))
    assert said == expected if kind == "large" else len(said) == 30


@pytest.mark.parametrize(
    "settings", [{}, {"top_k": 7}, {"top_p": 0.6}, {"temperature": 3.0, "top_k": 40, "top_p": 0.9}]
)
def test_draws_are_those_of_torch_multinomial(settings: dict[str, Any]) -> None:
    how = Sampling(**settings)
    logits = torch.randn(50, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 2
    ours, theirs = (torch.Generator().manual_seed(4) for _ in range(2))
    values, tokens = logits.topk(how.top_k or 50)
    shares = (values / how.temperature).softmax(0)
    if how.top_p:
        shares = shares.where(shares.cumsum(0) - shares < how.top_p, 0)
    for _ in range(200):
        expected = int(tokens[torch.multinomial(shares, 1, generator=theirs)])
        assert draw(logits, how, ours) == expected


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-5, 1e308])
def test_extreme_temperatures_are_the_likeliest_token_and_even_shares(temperature: float) -> None:
    logits = torch.tensor([1.0, 30.0, -700.0, 29.0], dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    drawn = {draw(logits, Sampling(temperature=temperature), generator) for _ in range(60)}
    assert drawn == ({0, 1, 2, 3} if temperature > 1 else {1})


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("broken", ["nan", "inf", "-inf"])
def test_logits_that_are_no_numbers_are_an_error(broken: str, temperature: float) -> None:
    logits = torch.full((5,), float(broken), dtype=torch.float64)
    with pytest.raises(DivergedError, match="logits are not finite"):
        draw(logits, Sampling(temperature=temperature), torch.Generator())


def test_a_row_that_is_done_says_no_more() -> None:
    rows = sample(
        *(decoder(), [[1], [2]], 10),
        context_length=12,
        sampling=Sampling(temperature=1.0),
        is_done=lambda row, token: row == 0,
    )
    first, *rest = list(rows)
    assert first[0] is not None
    assert all(step[0] is None and step[1] is not None for step in rest)
    assert len(rest) == 9
    assert len(list(sample(decoder(), [[1]], 10, context_length=9, sampling=Sampling(), is_done=lambda *_: True))) == 1


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ([], {}, "prompt is empty"),
        ([0], {"num_tokens": -1}, "num_tokens = -1"),
        ([0], {"context_length": 0}, "context_length = 0"),
        ([0], {"temperature": -0.1}, "temperature = -0.1"),
        ([0], {"temperature": float("nan")}, "temperature = nan"),
        ([0], {"temperature": float("inf")}, "temperature = inf"),
        ([0], {"top_k": 0}, "top_k = 0"),
        ([0], {"top_p": 1.5}, "top_p = 1.5"),
    ],
)
def test_settings_out_of_range_are_refused(prompt: list[int], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        continue_one(Fixed(), prompt, settings.pop("num_tokens", 1), **settings)
