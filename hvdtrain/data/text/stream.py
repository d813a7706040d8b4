"""Text as training data: prepared once per host into memory-mapped tokens, read as windows.

The stream is `eot document eot document ... eot`, so that every byte of every document is predicted exactly once.
Cached under a hash of everything that makes it:

    CACHE/HASH/train.bin, val.bin             the tokens, uint16 (uint32 for vocabularies above 65536)
              /train.bytes.bin, val.bytes.bin the same text as byte tokens, where the tokens are not bytes
              /tokenizer.json, meta.json
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from hvdtrain.data.config import TextConfig, cache_dir
from hvdtrain.data.text.corpus import Document, read_all
from hvdtrain.data.text.sealed import cannot_keep, sealed_folder
from hvdtrain.data.text.splits import Hashed, find_splits
from hvdtrain.data.text.token_files import content_hash, read_token_files
from hvdtrain.data.text.tokenize import Meter, token_dtype, write_tokens
from hvdtrain.data.text.tokenizer import ByteTokenizer, Tokenizer, load_bpe, load_tokenizer, train_bpe
from hvdtrain.data.text.windows import Shard
from hvdtrain.errors import DataError, counted, reason_of

FORMAT_VERSION = 2


@dataclass(frozen=True)
class PreparedText:
    """Where the tokens lie, and what is known about them. Figures of the text itself are None for .bin files."""

    train_shards: tuple[Shard, ...]
    val_shards: tuple[Shard, ...]
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
    prepared = _use_token_files(config, say) if config.is_tokens else _prepare_documents(config, say)
    for name, count in (("training", prepared.num_train_tokens), ("held-out", prepared.num_val_tokens)):
        if count < config.sequence_length + 1:
            raise DataError(
                f"the {name} text has {counted(count, 'token')}, fewer than one sample of {config.sequence_length} + 1:"
                f" use more text, {_more_held_out(config) if name == 'held-out' else ''}or a smaller"
                " --data.sequence-length"
            )
    return prepared


def _more_held_out(config: TextConfig) -> str:
    is_split = config.val_path is None and not config.is_tokens
    return f"a larger --data.val-fraction (it is {config.val_fraction:g}), --data.val-path, " if is_split else ""


def _prepare_documents(config: TextConfig, say: Callable[[str], None]) -> PreparedText:
    train, held_out = find_splits(config, say)
    digest = _content_hash(config, train, held_out)
    cache = cache_dir(config)
    try:
        folder = sealed_folder(cache, digest, lambda new: _write(new, config, train, held_out, say), say)
        return _read_prepared(folder, digest)
    except OSError as error:
        raise cannot_keep(cache, error) from error


def _content_hash(config: TextConfig, train: Hashed, held_out: Hashed) -> str:
    digest = hashlib.sha256(f"{FORMAT_VERSION} {config.tokenizer}".encode())
    if config.tokenizer == "bpe":
        digest.update(f" {config.vocab_size}".encode())
    elif config.tokenizer != "byte":
        digest.update(_read_bytes(Path(config.tokenizer)))
        digest.update(f" {config.end_of_text}".encode() if config.end_of_text is not None else b"")
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
            f"--data.tokenizer {path} is neither byte, bpe nor a tokenizer.json that can be read ({reason_of(error)})"
        ) from error


def _write(
    new: Path,
    config: TextConfig,
    train: Iterable[Document],
    held_out: Iterable[Document],
    say: Callable[[str], None],
) -> None:
    """Write a cache entry to an empty folder."""
    tokenizer = _build_tokenizer(config, train)
    tokenizer.save(new)
    meta: dict[str, int] = {"vocab_size": tokenizer.vocab_size, "eot": tokenizer.eot}
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
    return load_bpe(Path(config.tokenizer), name=config.end_of_text)


def _write_split(
    folder: Path, name: str, documents: Iterable[Document], tokenizer: Tokenizer, meta: dict[str, int], meter: Meter
) -> None:
    counts = write_tokens(folder / f"{name}.bin", documents, tokenizer, meter)
    if not isinstance(tokenizer, ByteTokenizer):
        write_tokens(folder / f"{name}.bytes.bin", documents, ByteTokenizer())
    meta[f"num_{name}_tokens"] = counts.tokens
    meta[f"num_{name}_bytes"] = counts.num_bytes


def _read_prepared(folder: Path, digest: str) -> PreparedText:
    meta = json.loads((folder / "meta.json").read_text())
    tokenizer = load_tokenizer(folder, meta.pop("eot", None))
    dtype = token_dtype(tokenizer.vocab_size)
    text = "{}.bin" if isinstance(tokenizer, ByteTokenizer) else "{}.bytes.bin"
    return PreparedText(
        train_shards=(Shard(folder / "train.bin", dtype),),
        val_shards=(Shard(folder / "val.bin", dtype),),
        train_text_path=folder / text.format("train"),
        val_text_path=folder / text.format("val"),
        tokenizer=tokenizer,
        content_hash=digest,
        **meta,
    )


def _use_token_files(config: TextConfig, say: Callable[[str], None]) -> PreparedText:
    """Take token files as they are."""
    tokenizer = None if config.tokenizer in ("byte", "bpe") else _build_tokenizer(config, ())
    if tokenizer is not None:  # each of its tokens may be asked for
        config = dataclasses.replace(config, vocab_size=max(config.vocab_size, tokenizer.vocab_size))
    train, held_out = read_token_files(config, say)
    return PreparedText(
        train_shards=train.shards,
        val_shards=held_out.shards,
        vocab_size=config.vocab_size,
        num_train_tokens=train.num_tokens,
        num_val_tokens=held_out.num_tokens,
        num_train_bytes=None,
        num_val_bytes=None,
        train_text_path=None,
        val_text_path=None,
        tokenizer=tokenizer,
        content_hash=content_hash(train, held_out),
    )
