"""Documents written as one stream of tokens, by all cores and in little memory."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hvdtrain.data.text.corpus import Document, read_all
from hvdtrain.data.text.tokenizer import Tokenizer
from hvdtrain.errors import megabytes

_SAY_EVERY_S = 10.0


@dataclass
class Counts:
    """How much was written."""

    tokens: int = 0
    num_bytes: int = 0


class Meter:
    """Tells from time to time how much text was tokenised, and how fast."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._started = self._said = time.monotonic()
        self._num_bytes = 0

    def add(self, num_bytes: int) -> None:
        """Count text that was tokenised."""
        self._num_bytes += num_bytes
        if time.monotonic() - self._said >= _SAY_EVERY_S:
            self._said = time.monotonic()
            self._say(f"tokenising: {self}")

    def __str__(self) -> str:
        seconds = time.monotonic() - self._started
        # In less than a tenth of a second the cores have hardly begun, and a rate would be theirs of beginning.
        rate = f", {self._num_bytes / 1e6 / seconds:,.1f} MB/s" if seconds >= 0.1 else ""
        return f"{megabytes(self._num_bytes)} in {seconds:.0f} s{rate}"


def write_tokens(path: Path, documents: Iterable[Document], tokenizer: Tokenizer, meter: Meter | None = None) -> Counts:
    """Write `eot text eot text ... eot`, a few megabytes in memory at a time, tokenised by all cores."""
    dtype = token_dtype(tokenizer.vocab_size)
    eot = np.array([tokenizer.eot], dtype).tobytes()
    counts = Counts(tokens=1)
    pieces, texts = itertools.tee(read_all(documents))
    encoded = tokenizer.encode_each(text for _, text in texts)
    with path.open("wb") as file:
        for (is_start, text), tokens in zip(pieces, encoded, strict=True):
            file.write(eot * is_start + tokens.astype(dtype).tobytes())
            counts.tokens += is_start + len(tokens)
            num_bytes = len(text.encode())
            counts.num_bytes += num_bytes
            if meter is not None:
                meter.add(num_bytes)
        file.write(eot)
    return counts


def token_dtype(vocab_size: int) -> str:
    """Return the type that holds every token, as numpy calls it."""
    return "uint16" if vocab_size <= 2**16 else "uint32"
