"""Files of tokens, taken as they are: as nanoGPT writes them, without a header, or as llm.c does, with one.

A header is 256 numbers, int32: a magic number, a version and the number of tokens. Without one the type of the tokens
is recognised: where every other 16 bits are hardly more than zero they are halves of uint32.
"""

from __future__ import annotations

import codecs
import contextlib
import glob
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hvdtrain.data.config import TextConfig, TokenType, cache_dir
from hvdtrain.data.links import leads_nowhere, refuse_link
from hvdtrain.data.text.encodings import CONTROL
from hvdtrain.data.text.known import KnownFiles
from hvdtrain.data.text.shared import say_of
from hvdtrain.data.text.windows import Shard
from hvdtrain.errors import DataError, counted

FORMAT_VERSION = 4
_BLOCK = 1 << 22
_HEADER_BYTES = 256 * 4
# Magic number and version of a header -> type of the tokens.
_HEADERS = {(20240520, 1): "uint16", (20240801, 7): "uint32"}
# Upper halves of the tokens of a vocabulary of up to 262,144; fewer tokens than that many show nothing.
_LARGEST_UPPER_HALF = 3
_FEWEST_TO_TELL = 64


@dataclass(frozen=True)
class TokenFiles:
    """Files whose tokens follow each other, and what was read in them."""

    shards: tuple[Shard, ...]
    num_tokens: int
    largest: int
    """The largest token; -1 where there is none."""
    digests: tuple[str, ...]
    """Of each file."""

    @property
    def digest(self) -> str:
        """Return what changes when any token does."""
        return " ".join(self.digests)


def content_hash(train: TokenFiles, held_out: TokenFiles) -> str:
    """Return a hash of all tokens."""
    both = f"{FORMAT_VERSION} token files {train.digest} {held_out.digest}"
    return hashlib.sha256(both.encode()).hexdigest()[:32]


def read_token_files(config: TextConfig, say: Callable[[str], None]) -> tuple[TokenFiles, TokenFiles]:
    """Look at the files for training and the held-out ones, once per host and again when they have changed.

    Nothing in a token file says where it could be cut to hold a part out, so held-out ones must be given.

    Raises:
        DataError: a file is missing, is no token file, or holds tokens that are not in the vocabulary.
    """
    if not config.val_path:
        raise DataError(f"{config.path} is a token file: name the held-out one too, as in --data.val-path val.bin")
    train, held_out = (
        [_shard(path, config.token_type) for path in _find(str(given))] for given in (config.path, config.val_path)
    )
    found = _look_at(config, train, say), _look_at(config, held_out, say)
    of_training = set(found[0].digests)
    shared = [str(held_out[i].path) for i, digest in enumerate(found[1].digests) if digest in of_training]
    say_of(shared, len(held_out), say)
    return found


def _find(given: str) -> list[Path]:
    """Return the files that a path or a pattern names, sorted."""
    path = Path(given).expanduser()
    if path.is_file():
        return [path]
    named = [Path(match) for match in glob.glob(str(path))]  # noqa: PTH207
    for file in filter(leads_nowhere, named):
        refuse_link(file)
    found = sorted(file for file in named if file.is_file())
    if not found:
        raise DataError(f"the token file {given} does not exist")
    return found


def _shard(path: Path, asked: TokenType) -> Shard:
    """Return where the tokens of a file lie, and of what type they are.

    Raises:
        DataError: its header or its size contradict themselves, or the type that was asked for.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(2 * _BLOCK)
    magic, version, count = np.frombuffer(head[:12], np.int32).tolist() if len(head) >= _HEADER_BYTES else (0, 0, 0)
    found, offset = _HEADERS.get((magic, version)), _HEADER_BYTES
    _check_is_tokens(path, head, magic if found is None else 0, version)
    if found is None:
        found, offset = _type_by_content(path, head, size) if asked == "auto" else asked, 0
    elif asked not in ("auto", found):
        raise DataError(f"{path} says in its header that its tokens are {found}, not --data.token-type {asked}")
    width = np.dtype(found).itemsize
    if (size - offset) % width:
        raise DataError(f"{path} is no file of {found} tokens: it has {counted(size, 'byte')}, no multiple of {width}")
    if offset and count != (size - offset) // width:
        raise DataError(
            f"{path} says in its header that it has {count:,} tokens, and has {(size - offset) // width:,}: it was cut"
        )
    return Shard(path, found, offset)


def _check_is_tokens(path: Path, head: bytes, magic: int, version: int) -> None:
    """Raise DataError where a file is something else, all of whose numbers may be tokens.

    Args:
        path: names it.
        head: how it begins.
        magic: what a header begins with, where none is known of that magic and version.
        version: the number behind that.
    """
    if magic in {known for known, _ in _HEADERS}:
        raise DataError(f"{path} has a header of llm.c of version {version}, which is not known")
    if head.startswith((b"\x93NUMPY", b"PK\x03\x04")):
        raise DataError(
            f"{path} is an archive or an array of numpy or torch, not tokens alone: write those, as by"
            f" tokens.astype('uint16').tofile({str(path)!r})"
        )
    beginning = head[:_HEADER_BYTES]
    if len(beginning) >= 2 * _FEWEST_TO_TELL and not CONTROL.search(beginning):
        with contextlib.suppress(UnicodeDecodeError):
            codecs.getincrementaldecoder("utf-8")().decode(beginning)
            raise DataError(f"{path} holds text, not tokens: give it a name that does not end in .bin")


def _type_by_content(path: Path, head: bytes, size: int) -> str:
    if size % 4 or size < 4 * _FEWEST_TO_TELL:
        return "uint16"
    upper = np.frombuffer(head[: len(head) // 4 * 4], "<u2")[1::2]
    if int(upper.max()) > _LARGEST_UPPER_HALF:
        return "uint16"
    wholes = np.frombuffer(head[: len(head) // 8 * 8], "<u4")
    if size % 8 == 0 and len(wholes) >= 2 * _FEWEST_TO_TELL and wholes[::2].any() and not wholes[1::2].any():
        raise DataError(
            f"{path} holds numbers of 64 bits: write tokens as uint16 or uint32, as by"
            f" tokens.astype('uint32').tofile({str(path)!r})"
        )
    return "uint32"


def _look_at(config: TextConfig, shards: list[Shard], say: Callable[[str], None]) -> TokenFiles:
    named = {f"{shard.path.absolute()} {shard.dtype} {shard.offset}": shard for shard in shards}
    known = KnownFiles(cache_dir(config), f"tokens of {next(iter(named))}")
    paths = {name: shard.path.absolute() for name, shard in named.items()}
    found = list(known.values(paths, lambda name: _read(named[name])).values())
    if not known.can_keep:
        say(f"{shards[0].path} is read at every start: what is known of it cannot be kept in {cache_dir(config)}")
    largest = max(one["largest"] for one in found)
    if largest >= config.vocab_size:
        path = shards[[one["largest"] for one in found].index(largest)].path
        raise DataError(
            f"{path} holds token {largest}, but the vocabulary has {config.vocab_size}:"
            f" give --data.vocab-size {largest + 1} or more; they were read as {shards[0].dtype}, and"
            " --data.token-type says otherwise"
        )
    digests = tuple(one["digest"] for one in found)
    return TokenFiles(tuple(shards), sum(one["num_tokens"] for one in found), largest, digests)


def _read(shard: Shard) -> dict[str, int | str]:
    """Read a file once: how many tokens it has, the largest, and a hash."""
    digest, number, largest = hashlib.sha256(shard.dtype.encode()), 0, -1
    with shard.path.open("rb") as file:
        file.seek(shard.offset)
        while raw := file.read(2 * _BLOCK):
            tokens = np.frombuffer(raw, shard.dtype)
            digest.update(raw)
            number += len(tokens)
            largest = max(largest, int(tokens.max()))
    return {"num_tokens": number, "largest": largest, "digest": digest.hexdigest()}
