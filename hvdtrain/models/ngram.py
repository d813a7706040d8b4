"""A trigram model of bytes: what a table of counts knows, to hold a neural network against.

Interpolated Witten-Bell smoothing (Witten and Bell 1991, IEEE Transactions on Information Theory 37(4), method C;
in the interpolated form of Chen and Goodman 1999, Computer Speech and Language 13, equation 17):

    P(c | h) = (count(h c) + types(h) P(c | h')) / (count(h) + types(h))

with `h'` the history h less its first symbol, `types(h)` the number of different symbols seen after h, and the uniform
distribution below the empty history.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

NUM_SYMBOLS = 257
"""256 bytes and the end of text."""
_ORDER = 3
_BLOCK = 1 << 20

Symbols = NDArray[np.uint16]


class TrigramModel:
    """Counts of one, two and three symbols in a row. Make one with `fit`."""

    def __init__(self, counts: list[NDArray[np.int64]]) -> None:
        self._counts = counts
        tables = [count.reshape(-1, NUM_SYMBOLS) for count in counts]
        self._totals = [table.sum(1) for table in tables]
        self._types = [(table > 0).sum(1) for table in tables]

    @classmethod
    def fit(cls, symbols: Symbols) -> TrigramModel:
        """Count `symbols`, values in `[0, 257)`, block by block: they may lie in a mapped file."""
        trigrams = np.zeros(NUM_SYMBOLS**_ORDER, np.int64)
        for grams in _grams(symbols, _ORDER):
            np.add.at(trigrams, grams, 1)
        counts = [trigrams]
        for length in range(_ORDER - 1, 0, -1):
            # Every run but the very first ends a longer one.
            shorter = counts[0].reshape(NUM_SYMBOLS, -1).sum(0)
            if len(symbols) >= length:
                shorter[_index(symbols[:length])] += 1
            counts.insert(0, shorter)
        return cls(counts)

    def nats(self, symbols: Symbols) -> float:
        """Return the negative log-likelihood, in nats, of all symbols but the first.

        A symbol without two predecessors is predicted from those it has.
        """
        first = symbols[:2]
        total = -float(np.log(self._probabilities(_index(first), 2)).sum()) if len(first) == 2 else 0.0
        for grams in _grams(symbols, _ORDER):
            total -= float(np.log(self._probabilities(grams, _ORDER)).sum())
        return total

    def distribution(self, history: Symbols) -> NDArray[np.float64]:
        """Return the probability of each symbol, `(257,)`, after a history of at most two symbols."""
        grams = int(_index(history)[0] if len(history) else 0) * NUM_SYMBOLS + np.arange(NUM_SYMBOLS)
        return self._probabilities(grams, len(history) + 1)

    def _probabilities(self, grams: NDArray[np.int64], length: int) -> NDArray[np.float64]:
        """Return P(last symbol | those before it) for grams of `length` symbols, each one number to base 257."""
        if length == 0:
            return np.full(len(grams), 1 / NUM_SYMBOLS)
        lower = self._probabilities(grams % NUM_SYMBOLS ** (length - 1), length - 1)
        histories = grams // NUM_SYMBOLS
        types, totals = self._types[length - 1][histories], self._totals[length - 1][histories]
        seen = self._counts[length - 1][grams]
        # A history that was never seen says nothing: the shorter one decides.
        return np.where(totals > 0, (seen + types * lower) / np.maximum(totals + types, 1), lower)


def _grams(symbols: Symbols, length: int) -> Iterator[NDArray[np.int64]]:
    """Yield every run of `length` symbols as one number to base 257, in blocks that bound the memory."""
    last = len(symbols) - length + 1
    for start in range(0, last, _BLOCK):
        part = symbols[start : min(start + _BLOCK, last) + length - 1].astype(np.int64)
        grams = np.zeros(len(part) - length + 1, np.int64)
        for i in range(length):
            grams = grams * NUM_SYMBOLS + part[i : len(part) - length + 1 + i]
        yield grams


def _index(symbols: Symbols) -> NDArray[np.int64]:
    """Return the one number to base 257 that a run of symbols makes, `(1,)`."""
    number = 0
    for symbol in symbols:
        number = number * NUM_SYMBOLS + int(symbol)
    return np.array([number])
