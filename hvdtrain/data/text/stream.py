"""Text as training data: prepared once per host into memory-mapped tokens, read as windows.

The stream is `eot document eot document ... eot`, so that every byte of every document is predicted exactly once.
Cached under a hash of everything that makes it:

    CACHE/HASH/train.bin, val.bin             the tokens, uint16 (uint32 for vocabularies above 65536)
              /train.bytes.bin, val.bytes.bin the same text as byte tokens, where the tokens are not bytes
              /tokenizer.json, meta.json
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hvdtrain.data.config import CorpusConfig, TextConfig
from hvdtrain.data.text.corpus import (
    Document,
    check_single_file,
    find_documents,
    read_all,
    split_documents,
    standard_library,
)
from hvdtrain.data.text.tokenizer import ByteTokenizer, Tokenizer, load_bpe, load_tokenizer, train_bpe
from hvdtrain.errors import DataError
from hvdtrain.settings.files import locked, written_whole

FORMAT_VERSION = 2
_BATCH_PIECES = 32
_SAY_EVERY_S = 10.0


@dataclass(frozen=True)
class PreparedText:
    """Where the tokens lie, and what is known about them. Figures of the text itself are None for .bin files."""

    train_path: Path
    val_path: Path
    dtype: str
    vocab_size: int
    num_train_tokens: int
    num_val_tokens: int
    num_train_bytes: int | None
    num_val_bytes: int | None
    train_text_path: Path | None
    """The text as uint16 byte tokens, 256 before each document and at the end."""
    val_text_path: Path | None
    tokenizer: Tokenizer | None
    content_hash: str


def prepare_text(config: TextConfig, say: Callable[[str], None] = lambda text: None) -> PreparedText:
    """Tokenize the corpus, or find it in the cache; of several processes on a host one works, the others wait.

    Raises:
        DataError: no usable text, or it cannot be written; the message says what to do.
    """
    prepared = _use_token_files(config) if (config.path or "").endswith(".bin") else _prepare_documents(config, say)
    for name, count in (("training", prepared.num_train_tokens), ("held-out", prepared.num_val_tokens)):
        if count < config.sequence_length + 1:
            raise DataError(
                f"the {name} text has {count} tokens, fewer than one sample of {config.sequence_length} + 1:"
                " use more text, or a smaller --data.sequence-length"
            )
    return prepared


def _prepare_documents(config: TextConfig, say: Callable[[str], None]) -> PreparedText:
    train, held_out = find_splits(config, say)
    digest = _content_hash(config, train, held_out)
    cache = cache_dir(config)
    folder = cache / digest
    try:
        cache.mkdir(parents=True, exist_ok=True)
        if not folder.exists():
            with locked(cache / f"{digest}.lock"):
                if not folder.exists():
                    _write(folder, config, train, held_out, say)
        return _read_prepared(folder, digest)
    except OSError as error:
        raise DataError(
            f"prepared tokens cannot be kept in {cache} ({error.strerror or error}): free some space there,"
            " or choose another --data.cache-dir"
        ) from error


def find_splits(config: CorpusConfig, say: Callable[[str], None]) -> tuple[dict[Document, str], dict[Document, str]]:
    """Return the training and the held-out documents with their hashes, only those that hold UTF-8 text.

    Raises:
        DataError: there are none.
    """
    documents = _usable(config.path, find_documents(config.path) if config.path else standard_library(), say)
    if config.val_path:
        return documents, _usable(config.val_path, find_documents(config.val_path), say)
    train, held_out = split_documents([*documents], config.val_fraction)
    # A part of a document has a hash of its own.
    both = [{part: documents.get(part) or part.digest() or "" for part in split} for split in (train, held_out)]
    return both[0], both[1]


def _usable(path: str | None, documents: list[Document], say: Callable[[str], None]) -> dict[Document, str]:
    """Return the documents that hold text, each with its hash."""
    if len(documents) == 1:
        check_single_file(documents[0])
    digests = {document: document.digest() for document in documents}
    usable = {document: digest for document, digest in digests.items() if digest}
    if not usable:
        raise DataError(f"{path} holds no UTF-8 text: its files are empty, or something else")
    left_out = sum(document.path.stat().st_size > 0 for document in documents) - len(usable)
    if left_out and path:
        say(f"left out {left_out} of {len(documents)} files of {path}: they are not UTF-8 text")
    return usable


def _content_hash(config: TextConfig, train: dict[Document, str], held_out: dict[Document, str]) -> str:
    digest = hashlib.sha256(f"{FORMAT_VERSION} {config.tokenizer}".encode())
    if config.tokenizer == "bpe":
        digest.update(f" {config.vocab_size}".encode())
    elif config.tokenizer != "byte":
        digest.update(_read_bytes(Path(config.tokenizer)))
    for split in (train, held_out):
        digest.update(b"\0split")
        for hashed in split.values():
            digest.update(hashed.encode())
    return digest.hexdigest()[:32]


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"--data.tokenizer {path} is neither byte, bpe nor a tokenizer.json that can be read ({error.strerror})"
        ) from error


def cache_dir(config: CorpusConfig) -> Path:
    """Return where prepared tokens are kept."""
    if config.cache_dir:
        return Path(config.cache_dir).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "hvdtrain" / "tokens"


def _write(
    folder: Path,
    config: TextConfig,
    train: Iterable[Document],
    held_out: Iterable[Document],
    say: Callable[[str], None],
) -> None:
    """Write a cache entry."""
    with written_whole(folder) as new:
        tokenizer = _build_tokenizer(config, train)
        tokenizer.save(new)
        meta: dict[str, int] = {"vocab_size": tokenizer.vocab_size}
        meter = Meter(say)
        for name, documents in (("train", train), ("val", held_out)):
            _write_split(new, name, documents, tokenizer, meta, meter)
        (new / "meta.json").write_text(json.dumps(meta))
    say(f"prepared text: {meter}")


def _build_tokenizer(config: TextConfig, train: Iterable[Document]) -> Tokenizer:
    if config.tokenizer == "byte":
        return ByteTokenizer()
    if config.tokenizer == "bpe":
        return train_bpe((piece for _, piece in read_all(train)), config.vocab_size)
    return load_bpe(Path(config.tokenizer))


def _write_split(
    folder: Path, name: str, documents: Iterable[Document], tokenizer: Tokenizer, meta: dict[str, int], meter: Meter
) -> None:
    counts = _write_tokens(folder / f"{name}.bin", documents, tokenizer, meter)
    if not isinstance(tokenizer, ByteTokenizer):
        _write_tokens(folder / f"{name}.bytes.bin", documents, ByteTokenizer())
    meta[f"num_{name}_tokens"] = counts.tokens
    meta[f"num_{name}_bytes"] = counts.num_bytes


@dataclass
class _Counts:
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
        seconds, megabytes = time.monotonic() - self._started, self._num_bytes / 1e6
        return f"{megabytes:,.1f} MB in {seconds:.0f} s, {megabytes / max(seconds, 1e-3):,.1f} MB/s"


def _write_tokens(
    path: Path, documents: Iterable[Document], tokenizer: Tokenizer, meter: Meter | None = None
) -> _Counts:
    """Write `eot text eot text ... eot`, a few megabytes in memory at a time, tokenised by all cores."""
    dtype = _dtype(tokenizer.vocab_size)
    eot = np.array([tokenizer.eot], dtype).tobytes()
    counts = _Counts(tokens=1)
    pieces = read_all(documents)
    with path.open("wb") as file:
        while batch := list(itertools.islice(pieces, _BATCH_PIECES)):
            num_bytes = sum(len(text.encode()) for _, text in batch)
            encoded = tokenizer.encode_batch([text for _, text in batch])
            for (is_start, _), tokens in zip(batch, encoded, strict=True):
                file.write(eot * is_start + tokens.astype(dtype).tobytes())
                counts.tokens += is_start + len(tokens)
            counts.num_bytes += num_bytes
            if meter is not None:
                meter.add(num_bytes)
        file.write(eot)
    return counts


def _dtype(vocab_size: int) -> str:
    return "uint16" if vocab_size <= 2**16 else "uint32"


def _read_prepared(folder: Path, digest: str) -> PreparedText:
    meta = json.loads((folder / "meta.json").read_text())
    tokenizer = load_tokenizer(folder)
    text = "{}.bin" if isinstance(tokenizer, ByteTokenizer) else "{}.bytes.bin"
    return PreparedText(
        train_path=folder / "train.bin",
        val_path=folder / "val.bin",
        dtype=_dtype(tokenizer.vocab_size),
        train_text_path=folder / text.format("train"),
        val_text_path=folder / text.format("val"),
        tokenizer=tokenizer,
        content_hash=digest,
        **meta,
    )


def _use_token_files(config: TextConfig) -> PreparedText:
    """Take uint16 token files as they are; nothing in them says where one could be cut to hold a part out."""
    train, held_out = Path(config.path or ""), Path(config.val_path or "")
    if not config.val_path:
        raise DataError(f"{train} is a token file: name the held-out one too, as in --data.val-path val.bin")
    digest = hashlib.sha256(f"{FORMAT_VERSION} token files".encode())
    counts = []
    for path in (train, held_out):
        tokens = _read_token_file(path, config.vocab_size)
        counts.append(len(tokens))
        digest.update(f"{len(tokens)} ".encode())
        digest.update(tokens.data)
    return PreparedText(
        train_path=train,
        val_path=held_out,
        dtype="uint16",
        vocab_size=config.vocab_size,
        num_train_tokens=counts[0],
        num_val_tokens=counts[1],
        num_train_bytes=None,
        num_val_bytes=None,
        train_text_path=None,
        val_text_path=None,
        tokenizer=None,
        content_hash=digest.hexdigest()[:32],
    )


def _read_token_file(path: Path, vocab_size: int) -> NDArray[np.uint16]:
    if not path.is_file():
        raise DataError(f"the token file {path} does not exist")
    size = path.stat().st_size
    if size % 2:
        raise DataError(f"{path} is no file of uint16 tokens: it has an odd number of bytes")
    if size == 0:
        return np.zeros(0, np.uint16)
    tokens = np.memmap(path, np.uint16, "r")
    largest = int(tokens.max())
    if largest >= vocab_size:
        raise DataError(
            f"{path} holds token {largest}, but the vocabulary has {vocab_size}:"
            f" give --data.vocab-size {largest + 1} or more"
        )
    return tokens
