"""Files of uint16 tokens, as nanoGPT writes them: taken as they are."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hvdtrain.data.config import TextConfig, cache_dir
from hvdtrain.data.text.known import KnownFiles
from hvdtrain.errors import DataError

FORMAT_VERSION = 3
_BLOCK = 1 << 22


@dataclass(frozen=True)
class TokenFile:
    """A file, and what was read in it."""

    path: Path
    num_tokens: int
    largest: int
    """The largest token; -1 where there is none."""
    digest: str


@dataclass(frozen=True)
class TokenFiles:
    """The training and the held-out tokens."""

    train: TokenFile
    held_out: TokenFile

    @property
    def content_hash(self) -> str:
        """Return a hash of all tokens."""
        both = f"{FORMAT_VERSION} token files {self.train.digest} {self.held_out.digest}"
        return hashlib.sha256(both.encode()).hexdigest()[:32]


def read_token_files(config: TextConfig, say: Callable[[str], None]) -> TokenFiles:
    """Look at both files, once per host and again when they have changed.

    Nothing in a token file says where it could be cut to hold a part out, so the held-out one must be given.

    Raises:
        DataError: a file is missing, is no token file, or holds tokens that are not in the vocabulary.
    """
    train, held_out = Path(config.path or ""), Path(config.val_path or "")
    if not config.val_path:
        raise DataError(f"{train} is a token file: name the held-out one too, as in --data.val-path val.bin")
    for path in (train, held_out):
        _check_size(path)
    files = {name: _look_at(config, path, say) for name, path in (("train", train), ("held_out", held_out))}
    return TokenFiles(**files)


def _check_size(path: Path) -> None:
    if not path.is_file():
        raise DataError(f"the token file {path} does not exist")
    if path.stat().st_size % 2:
        raise DataError(f"{path} is no file of uint16 tokens: it has an odd number of bytes")


def _look_at(config: TextConfig, path: Path, say: Callable[[str], None]) -> TokenFile:
    whole = path.absolute()
    known = KnownFiles(cache_dir(config), f"tokens of {whole}")
    found = TokenFile(path, **known.values({"tokens": whole}, lambda _: _read(whole))["tokens"])
    if not known.can_keep:
        say(f"{path} is read at every start: what is known of it cannot be kept in {cache_dir(config)}")
    if found.largest >= config.vocab_size:
        raise DataError(
            f"{path} holds token {found.largest}, but the vocabulary has {config.vocab_size}:"
            f" give --data.vocab-size {found.largest + 1} or more"
        )
    return found


def _read(path: Path) -> dict[str, int | str]:
    """Read a file once: how many tokens it has, the largest, and a hash."""
    digest, number, largest = hashlib.sha256(), 0, -1
    with path.open("rb") as file:
        while raw := file.read(2 * _BLOCK):
            tokens = np.frombuffer(raw, np.uint16)
            digest.update(raw)
            number += len(tokens)
            largest = max(largest, int(tokens.max()))
    return {"num_tokens": number, "largest": largest, "digest": digest.hexdigest()}
