"""Settings of text, and where it is kept once it is prepared. Standard library only."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from hvdtrain.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Text to train on."""

    path: str | None = None
    """UTF-8 text file, directory or glob, or a .bin file of uint16 tokens as nanoGPT writes it. None: the source code
    of the running Python's standard library."""
    val_path: str | None = None
    """Held-out text, or .bin file. None: part of --data.path, split by file."""
    tokenizer: str = "byte"
    """byte; bpe: a byte-level BPE trained on the training text; or the path of a tokenizer.json."""
    vocab_size: int = 4096
    """Tokens of a bpe that is trained, or of the .bin files."""
    sequence_length: int = 256
    """Tokens of a sample."""
    val_fraction: float = 0.05
    """Share of the files (of a single file: of its bytes, at the end) that is held out."""
    cache_dir: str | None = None
    """Where prepared tokens are kept. None: hvdtrain/tokens in the user's cache directory."""

    def __post_init__(self) -> None:
        if self.sequence_length < 1:
            raise ConfigError(f"sequence_length = {self.sequence_length} must be greater than 0")
        if not 0 < self.val_fraction < 1:
            raise ConfigError(f"val_fraction = {self.val_fraction} must be between 0 and 1")
        if not 257 <= self.vocab_size <= 2**31:
            raise ConfigError(f"vocab_size = {self.vocab_size} must be at least 257: the bytes and the end of text")


def cache_dir(config: TextConfig) -> Path:
    """Return where prepared tokens are kept."""
    if config.cache_dir:
        return Path(config.cache_dir).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "hvdtrain" / "tokens"
