"""Sampling from models whose distribution is known."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from hvdtrain.errors import ConfigError
from hvdtrain.models.decoder import Decoder, DecoderConfig
from hvdtrain.models.sampling import sample

PROBABILITIES = torch.tensor([0.5, 0.3, 0.15, 0.05])


class Fixed(nn.Module):
    """Always the same distribution; remembers what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(PROBABILITIES.log() + 3.0)
        self.seen: list[list[int]] = []
        self.modes: set[tuple[bool, bool]] = set()

    def forward(self, tokens: Tensor) -> Tensor:
        self.seen.append(tokens[0].tolist())
        self.modes.add((self.training, torch.is_grad_enabled()))
        return self.logits.expand(*tokens.shape, -1)


def frequencies(tokens: list[int]) -> list[float]:
    counts = Counter(tokens)
    return [counts[token] / len(tokens) for token in range(4)]


def test_tokens_come_with_their_probabilities() -> None:
    tokens = sample(Fixed(), [0], 4000, context_length=4, temperature=1.0)
    assert frequencies(tokens) == pytest.approx(PROBABILITIES.tolist(), abs=0.03)


def test_temperature_sharpens() -> None:
    tokens = sample(Fixed(), [0], 4000, context_length=4, temperature=0.5)
    expected = PROBABILITIES.square() / PROBABILITIES.square().sum()
    assert frequencies(tokens) == pytest.approx(expected.tolist(), abs=0.03)


def test_temperature_zero_takes_the_likeliest() -> None:
    assert sample(Fixed(), [3], 5, context_length=4, temperature=0) == [0] * 5


def test_top_k_leaves_out_the_rest() -> None:
    tokens = sample(Fixed(), [0], 4000, context_length=4, temperature=1.0, top_k=2)
    assert frequencies(tokens) == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)
    assert 3 in sample(Fixed(), [0], 500, context_length=4, temperature=1.0, top_k=99)


def test_the_model_sees_the_newest_tokens_in_order() -> None:
    model = Fixed()
    new = sample(model, [3, 2, 1], 3, context_length=4)
    assert model.seen == [[3, 2, 1], [3, 2, 1, new[0]], [2, 1, new[0], new[1]]]


def test_seed_decides_and_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = sample(Fixed(), [0], 50, context_length=4, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert sample(Fixed(), [0], 50, context_length=4, seed=1) == first
    assert sample(Fixed(), [0], 50, context_length=4, seed=2) != first


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_and_gradients_are_off_only_meanwhile(training: bool) -> None:
    model = Fixed().train(training)
    sample(model, [0], 2, context_length=4)
    assert model.modes == {(False, False)}
    assert model.training is training
    model.logits.data = model.logits.data * float("nan")
    with pytest.raises(RuntimeError):
        sample(model, [0], 2, context_length=4)
    assert model.training is training


def test_a_decoder_continues_a_prompt() -> None:
    model = Decoder(DecoderConfig(num_layers=1, hidden_size=16, num_heads=2), 20)
    tokens = sample(model, [1, 2, 3], 12, context_length=8)
    assert len(tokens) == 12
    assert all(0 <= token < 20 for token in tokens)


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ([], {}, "prompt is empty"),
        ([0], {"num_tokens": -1}, "num_tokens = -1"),
        ([0], {"context_length": 0}, "context_length = 0"),
        ([0], {"temperature": -0.1}, "temperature = -0.1"),
        ([0], {"top_k": 0}, "top_k = 0"),
    ],
)
def test_settings_out_of_range_are_refused(prompt: list[int], settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sample(Fixed(), prompt, **{"num_tokens": 1, "context_length": 4, **settings})
