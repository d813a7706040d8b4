"""The settings of data. Standard library only: the command line reads them before torch is there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hvdtrain.settings import DataConfig, setting

DatasetName = Literal["mnist", "fashion-mnist"]
TokenType = Literal["auto", "uint16", "uint32"]


@dataclass(frozen=True, kw_only=True)
class CorpusConfig(DataConfig):
    """Text files, and which part of them is held out."""

    path: str | None = setting(None, path="data")
    """UTF-8 text file, directory or glob. None: the source code of the running Python's standard library."""
    val_path: str | None = setting(None, path="data")
    """Held-out text. None: part of --data.path, split by file."""
    sequence_length: int = setting(256, above=0, maximum=2**24)
    """Tokens of a sample."""
    val_fraction: float = setting(0.05, above=0, below=1)
    """Share of the files (of a single file: of its bytes, at the end) that is held out."""
    cache_dir: str | None = setting(None, path="new directory")
    """Where prepared tokens are kept. None: hvdtrain/tokens in the user's cache directory."""

    def unused(self) -> Iterator[tuple[str, str]]:
        """Yield the share that is held out where it has files of its own."""
        yield from super().unused()
        if self.val_path is not None:
            yield "val_fraction", "--data.val-path says what is held out"


@dataclass(frozen=True, kw_only=True)
class TextConfig(CorpusConfig):
    """Text to train on."""

    path: str | None = setting(None, path="data")
    """UTF-8 text file, directory or glob, or .bin files of tokens as nanoGPT or llm.c write them (nanochat writes none:
    the recipe hf reads its parquet files). None: the source code of the running Python's standard library."""
    val_path: str | None = setting(None, path="data")
    """Held-out text, or .bin files. None: part of --data.path, split by file."""
    tokenizer: str = setting("byte", path="file or name")
    """byte; bpe: a byte-level BPE trained on the training text; or the path of a tokenizer.json. Of .bin files the one
    that their tokens are of: only with it can a model of them write text."""
    vocab_size: int = setting(4096, minimum=257, maximum=2**31)
    """Tokens of a bpe that is trained, or of the .bin files; at least the 256 bytes and the end of text."""
    end_of_text: str | None = None
    """Token of a tokenizer.json that stands between documents. None: found by its usual names."""
    token_type: TokenType = "auto"
    """Of .bin files without a header. auto: recognised by their content."""

    @property
    def is_tokens(self) -> bool:
        """Return whether the data is a file of tokens, not of text."""
        return (self.path or "").endswith(".bin")

    def unused(self) -> Iterator[tuple[str, str]]:
        """Yield what only texts, or only other tokenizers, need."""
        yield from super().unused()
        if not self.is_tokens:
            yield "token_type", "it is for .bin files"
        is_made = self.tokenizer in ("byte", "bpe")
        if is_made:
            yield "end_of_text", "it is for a tokenizer.json of --data.tokenizer"
        if self.is_tokens and is_made:
            yield "tokenizer", f"{self.path} holds tokens, not text: only the tokenizer.json that they are of says more"
        elif not self.is_tokens and self.tokenizer != "bpe":
            yield "vocab_size", f"it is for --data.tokenizer bpe and .bin files; the tokenizer is {self.tokenizer}"


@dataclass(frozen=True, kw_only=True)
class VisionConfig(DataConfig):
    """The images. The data set's own test images are the held-out data."""

    dataset: DatasetName = "mnist"
    """mnist: handwritten digits. fashion-mnist: pieces of clothing, same sizes and layout."""
    root: str = setting("data", path="name")
    """Directory of the data sets; the files lie in ROOT/MNIST/raw or ROOT/FashionMNIST/raw."""
    download: bool = False
    """Download what is missing, once per host."""


def cache_dir(config: CorpusConfig) -> Path:
    """Return where prepared tokens are kept."""
    return cache_at(config.cache_dir)


def cache_at(folder: str | None) -> Path:
    """Return the directory of prepared data that a setting names; None: hvdtrain/tokens in the user's cache."""
    if folder:
        return Path(folder).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "hvdtrain" / "tokens"
