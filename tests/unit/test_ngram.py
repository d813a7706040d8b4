"""The trigram baseline: a proper distribution, and the formula by hand."""

import math
import tracemalloc

import numpy as np
import pytest

from hvdtrain.models import ngram
from hvdtrain.models.ngram import TrigramModel


def symbols(text):
    return np.frombuffer(text.encode(), np.uint8).astype(np.uint16)


@pytest.mark.parametrize("history", ["", "a", "b", "z", "ab", "zz", "az"])
def test_probabilities_sum_to_one(history):
    model = TrigramModel.fit(symbols("abracadabra abracadabra"))
    distribution = model.distribution(symbols(history))
    assert distribution.shape == (257,)
    assert distribution.min() > 0
    assert distribution.sum() == pytest.approx(1, abs=1e-12)


def test_the_formula_by_hand():
    model = TrigramModel.fit(symbols("aab"))  # grams: a 2, b 1; aa 1, ab 1; aab 1
    p_b = (1 + 2 / 257) / (3 + 2)
    p_b_after_a = (1 + 2 * p_b) / (2 + 2)
    p_b_after_aa = (1 + 1 * p_b_after_a) / (1 + 1)
    assert model.distribution(symbols("aa"))[ord("b")] == pytest.approx(p_b_after_aa)
    # After "ba", never seen, the shorter history decides.
    assert model.distribution(symbols("ba"))[ord("b")] == pytest.approx(p_b_after_a)
    p_a_after_a = (1 + 2 * (2 + 2 / 257) / 5) / 4
    assert model.nats(symbols("aab")) == pytest.approx(-math.log(p_a_after_a) - math.log(p_b_after_aa))


@pytest.mark.parametrize("text", ["", "a", "ab", "abc", "the quick brown fox jumps over the lazy dog " * 9])
def test_all_runs_are_counted(text, monkeypatch):
    monkeypatch.setattr(ngram, "_BLOCK", 7)
    model, numbers = TrigramModel.fit(symbols(text)), list(symbols(text))
    for length, counts in enumerate(model._counts, 1):
        runs = [numbers[i : i + length] for i in range(len(numbers) - length + 1)]
        expected = np.zeros(257**length, np.int64)
        for run in runs:
            expected[sum(int(symbol) * 257**power for power, symbol in enumerate(reversed(run)))] += 1
        assert (counts == expected).all()


def test_memory_does_not_grow_with_the_text(tmp_path):
    """Beside the table of counts, no more than a few blocks; no copy of the text, which lies in a mapped file."""
    peaks = []
    for megabytes in (8, 64):
        path = tmp_path / f"{megabytes}.bin"
        np.tile(symbols("a line of text, "), megabytes << 15).tofile(path)
        mapped = np.memmap(path, np.uint16, "r")
        tracemalloc.start()
        TrigramModel.fit(mapped).nats(mapped[: 1 << 22])
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert max(peaks) < 8 * 257**3 + (150 << 20)
    assert abs(peaks[1] - peaks[0]) < 1 << 20


def test_nats_count_every_symbol_but_the_first(monkeypatch):
    text = symbols("the quick brown fox jumps over the lazy dog " * 20)
    model = TrigramModel.fit(text)
    by_hand = -sum(math.log(model.distribution(text[max(0, i - 2) : i])[text[i]]) for i in range(1, 90))
    assert model.nats(text[:90]) == pytest.approx(by_hand)
    monkeypatch.setattr(ngram, "_BLOCK", 7)  # blocks must not lose or repeat a run
    assert model.nats(text[:90]) == pytest.approx(by_hand)
    assert TrigramModel.fit(text).nats(text[:90]) == pytest.approx(by_hand)
    assert model.nats(text[:1]) == 0.0


def test_text_it_knows_is_likelier():
    model = TrigramModel.fit(symbols("def f(x): return x\n" * 50))
    assert model.nats(symbols("def f(x):")) < model.nats(symbols("qzvkjwpxy")) / 3
