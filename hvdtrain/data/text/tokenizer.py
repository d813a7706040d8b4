"""Tokenizers: bytes as they are, or a byte-level BPE of the `tokenizers` library. Lossless for any UTF-8 text."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hvdtrain.errors import DataError, reason_of

END_OF_TEXT = "<|endoftext|>"
# What other tokenizers call the token between documents.
_END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[SEP]", "<|im_end|>")
BYTE_VOCAB_SIZE = 257
# Texts, of a megabyte at most as they come from files, that wait for each thread.
_TEXTS_AHEAD = 4


class Tokenizer(Protocol):
    """Text to tokens and back."""

    vocab_size: int
    eot: int
    """The token before each document."""

    def encode(self, text: str) -> NDArray[np.int64]:
        """Return the tokens of a text, int64 `(n,)`, without `eot`."""
        ...

    def encode_each(self, texts: Iterable[str]) -> Iterator[NDArray[np.int64]]:
        """Yield the tokens of each text in turn; where that takes long, all cores work on texts ahead."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens; bytes that are not UTF-8 become U+FFFD, and `eot` nothing."""
        ...

    def save(self, folder: Path) -> None:
        """Write what `load_tokenizer` needs."""
        ...


class ByteTokenizer:
    """Tokens 0 to 255 are bytes, 256 is the end of text."""

    vocab_size = BYTE_VOCAB_SIZE
    eot = 256

    def encode(self, text: str) -> NDArray[np.int64]:
        """Return the UTF-8 bytes of a text, int64 `(n,)`."""
        return np.frombuffer(text.encode(), np.uint8).astype(np.int64)

    def encode_each(self, texts: Iterable[str]) -> Iterator[NDArray[np.int64]]:
        """Yield the UTF-8 bytes of each text."""
        return map(self.encode, texts)

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of bytes."""
        return bytes(token for token in tokens if token < 256).decode(errors="replace")

    def save(self, folder: Path) -> None:
        """Write nothing: bytes need no file."""


class BpeTokenizer:
    """Wraps a `tokenizer.json` of the `tokenizers` library; `eot` is found by its usual names where it is not given."""

    eot: int

    def __init__(self, inner: Any, source: str, eot: int | None = None) -> None:
        self.inner = inner
        self.vocab_size = inner.get_vocab_size(with_added_tokens=True)
        if eot is not None:
            self.eot = eot
            return
        found = [inner.token_to_id(name) for name in _END_OF_TEXT_NAMES if inner.token_to_id(name) is not None]
        if not found:
            raise DataError(
                f"{source} has no end-of-text token of the names {', '.join(_END_OF_TEXT_NAMES)}: give its own, as in"
                " --data.end-of-text '<|bos|>'"
            )
        self.eot = found[0]

    def encode(self, text: str) -> NDArray[np.int64]:
        """Return the tokens of a text, int64 `(n,)`."""
        return self._tokens(text)

    def encode_each(self, texts: Iterable[str]) -> Iterator[NDArray[np.int64]]:
        """Yield the tokens of each text in turn, while all cores work on those that follow.

        A text is one thread's: batches would wait for the longest text of each, and for who takes the tokens from them.
        """
        num_threads = num_cores()
        ahead: deque[Future[NDArray[np.int64]]] = deque()
        pool = ThreadPoolExecutor(num_threads, "tokenise")
        try:
            for text in texts:
                ahead.append(pool.submit(self._tokens, text))
                if len(ahead) > _TEXTS_AHEAD * num_threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _tokens(self, text: str) -> NDArray[np.int64]:
        # Without finding out where each token stands, where the library offers that: it takes a third of the time.
        encode: Any = getattr(self.inner, "encode_batch_fast", self.inner.encode_batch)
        return np.array(encode([text], add_special_tokens=False)[0].ids, np.int64)

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens."""
        text: str = self.inner.decode([token for token in tokens if token != self.eot], skip_special_tokens=False)
        return text

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json`."""
        self.inner.save(str(folder / "tokenizer.json"))


def num_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def train_bpe(texts: Iterator[str], vocab_size: int) -> BpeTokenizer:
    """Train a byte-level BPE (Sennrich et al., arXiv:1508.07909) of at most `vocab_size` tokens on `texts`."""
    library = _tokenizers()
    inner = library.Tokenizer(library.models.BPE())
    inner.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(library.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return BpeTokenizer(inner, "the trained tokenizer")


def load_bpe(path: Path, eot: int | None = None, name: str | None = None) -> BpeTokenizer:
    """Load a `tokenizer.json`.

    Args:
        path: the file.
        eot: its end-of-text token, where that is known.
        name: what that token is called, else; None where it has one of the usual names.

    Raises:
        DataError: it cannot be read, or has no end-of-text token.
    """
    library = _tokenizers()
    try:
        inner = library.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"the tokenizer {path} cannot be read: {reason_of(error)}") from error
    except Exception as error:  # the library raises bare Exception for files it does not understand
        raise DataError(f"{path} is not a tokenizer.json of the tokenizers library: {error}") from error
    if name is not None and eot is None:
        eot = inner.token_to_id(name)
        if eot is None:
            raise DataError(f"--data.end-of-text: {path} has no token {name!r}")
    return BpeTokenizer(inner, str(path), eot)


def load_tokenizer(folder: Path, eot: int | None = None) -> Tokenizer:
    """Return the tokenizer that was saved in `folder`: its `tokenizer.json`, or bytes where there is none.

    Args:
        folder: where.
        eot: the token between documents; None: found by its usual names.
    """
    path = folder / "tokenizer.json"
    return load_bpe(path, eot) if path.exists() else ByteTokenizer()


def write_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    """Write the tokenizer as transformers' `AutoTokenizer` reads it, and `load_bpe`, too.

    Args:
        tokenizer: any; bytes become a byte-level BPE without merges, of the same tokens.
        folder: gets `tokenizer.json` and `tokenizer_config.json`.
        max_length: the most tokens that the model is made for.
    """
    inner = tokenizer.inner if isinstance(tokenizer, BpeTokenizer) else _bytes_as_bpe()
    inner.save(str(folder / "tokenizer.json"))
    end_of_text = inner.id_to_token(tokenizer.eot)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end_of_text,
        "eos_token": end_of_text,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _bytes_as_bpe() -> Any:
    library = _tokenizers()
    # Byte-level BPE writes a byte as a character: the printable ones of Latin-1 as themselves, the others from U+0100.
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    characters = {chr(byte if byte in printable else next(others)): byte for byte in range(256)}
    inner = library.Tokenizer(library.models.BPE(vocab=characters, merges=[]))
    inner.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = library.decoders.ByteLevel()
    inner.add_special_tokens([END_OF_TEXT])
    return inner


def _tokenizers() -> Any:
    # All cores tokenise; said aloud, since the library warns at every fork otherwise.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.pre_tokenizers
        import tokenizers.trainers
    except ImportError as error:
        raise DataError("--data.tokenizer needs the tokenizers library: pip install tokenizers") from error
    return tokenizers
