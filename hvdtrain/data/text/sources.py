"""The files of documents and records to train on, and which part of them is held out."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvdtrain.data.config import CorpusConfig, cache_dir
from hvdtrain.data.text.compressed import SUFFIXES
from hvdtrain.data.text.corpus import (
    Document,
    check_single_file,
    find_documents,
    split_documents,
    standard_library,
)
from hvdtrain.data.text.known import KnownFiles
from hvdtrain.data.text.named_splits import listed, named_splits
from hvdtrain.data.text.records import Kind, kind_of, read_records
from hvdtrain.data.text.shared import say_shared
from hvdtrain.data.text.splits import of_all, such_as, without_runs
from hvdtrain.errors import DataError

# What stands beside the data in a folder of a data set.
_NO_DATA = ("readme", "license", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


@dataclass(frozen=True)
class Source:
    """A file, or the part of it that is for training or held out."""

    document: Document
    kind: Kind | None
    """Of records; None for a text."""
    digest: str
    """Hash of its name and content."""
    held_out_below: float | None = None
    """Records are held out whose position, in [0, 1) by a hash, is not above this; None: all records are taken."""
    is_held_out: bool = False
    """Whether this is the held-out part."""

    def holds(self, raw: Any) -> bool:
        """Return whether a record belongs to this part."""
        return self.held_out_below is None or (position(raw) <= self.held_out_below) == self.is_held_out


def position(raw: Any) -> float:
    """Return a record's place in [0, 1), evenly, by a hash: equal records are never apart."""
    text = raw if isinstance(raw, str) else json.dumps(raw, sort_keys=True, default=str)
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def find_sources(config: CorpusConfig, say: Callable[[str], None]) -> dict[str, list[Source]]:
    """Return the sources by "train" and "val".

    Texts are held out by file, records one by one, or by the splits that the names of their files make. Files are read
    once per host, and again only where they change.

    Raises:
        DataError: there is nothing to read.
    """
    sources = _sources(config, config.path, say)
    if config.val_path:
        given = {"train": _of_training(sources, say), "val": _sources(config, config.val_path, say)}
        _say_shared(config, given, say)
        return given
    texts = {source.document: source for source in sources if source.kind is None}
    records = [source for source in sources if source.kind is not None]
    train: list[Document] = list(texts)
    held_out: list[Document] = []
    if len(texts) > 1 or not records:
        train, held_out = split_documents(train, config.val_fraction)
    split = {"train": [_part(texts, part) for part in train], "val": [_part(texts, part) for part in held_out]}
    _say_shared(config, split, say)
    for name, part in _split_records(records, config.val_fraction, say).items():
        split[name] += part
    return split


def _say_shared(config: CorpusConfig, parts: dict[str, list[Source]], say: Callable[[str], None]) -> None:
    """Say which held-out files are trained on, too; what is a part of a file is none."""
    if config.path:
        train, held_out = (
            [source.document.path for source in parts[name] if source.document.stop is None]
            for name in ("train", "val")
        )
        say_shared(train, held_out, cache_dir(config), say)


def _of_training(sources: list[Source], say: Callable[[str], None]) -> list[Source]:
    """Return the sources without files of records that name themselves another split than that for training."""
    named = named_splits([source.document for source in sources if source.kind is not None])
    if named is None:
        return sources
    train = [source for source in sources if source.kind is None or source.document in named.train]
    say(f"left out are {len(sources) - len(train)} files, whose names say that they are for validation or tests")
    return train


def _split_records(
    records: Sequence[Source], val_fraction: float, say: Callable[[str], None]
) -> dict[str, list[Source]]:
    """Return the files of records by split: by the splits that they name themselves, else every one in two parts."""
    named = named_splits([source.document for source in records])
    if named is not None:
        say(named.about)
        parts = {"train": named.train, "val": named.held_out}
        return {name: [source for source in records if source.document in part] for name, part in parts.items()}
    below = held_out_below((position(raw) for source in records for _, raw in _read(source)), val_fraction)
    return {
        name: [dataclasses.replace(s, held_out_below=below, is_held_out=name == "val") for s in records]
        for name in ("train", "val")
    }


def _part(texts: dict[Document, Source], part: Document) -> Source:
    """Return the source of a document, or of a part of the only one."""
    if part in texts:
        return texts[part]
    (whole,) = texts.values()
    return dataclasses.replace(whole, document=part, digest=f"{whole.digest} {part.start} {part.stop}")


def held_out_below(places: Iterable[float], fraction: float) -> float:
    """Return up to which place in [0, 1) things are held out: the fraction, or the first if none is below it.

    One thing is always held out. Places are asked for only until that is known.
    """
    smallest = 1.0
    for place in places:
        smallest = min(smallest, place)
        if smallest <= fraction:
            return fraction
    return smallest


def _read(source: Source) -> Iterator[tuple[str, Any]]:
    assert source.kind is not None
    return read_records(source.document.path, source.kind)


def _sources(config: CorpusConfig, path: str | None, say: Callable[[str], None]) -> list[Source]:
    documents = listed(without_runs(find_documents(path), path, say)) if path else standard_library()
    kinds = {document: kind_of(document.path) if path else None for document in documents}
    if len(documents) > 1 and any(kinds.values()):
        beside = [document for document in documents if Path(document.name).name.lower().startswith(_NO_DATA)]
        documents = [document for document in documents if document not in beside]
        if beside:
            say(f"left out beside the data in {path}: {', '.join(document.name for document in beside)}")
    hashes = _hashes(config, path, documents, kinds)
    usable = [Source(document, kinds[document], found) for document, found in hashes.items() if found]
    if not usable:
        if len(documents) == 1:
            _check_single_file(documents[0])
        raise DataError(f"{path} holds no UTF-8 text and no records: its files are empty, or something else")
    left_out = [item.name for item, found in hashes.items() if not found and item.path.stat().st_size > 0]
    if left_out and path:
        say(
            f"left out {of_all(left_out, documents)} of {path}, being neither UTF-8 text nor records{such_as(left_out)}"
        )
    return usable


def _check_single_file(document: Document) -> None:
    """Raise DataError where the one file that a user named is a text that cannot be read; says why."""
    if document.path.suffix.lower() in SUFFIXES:
        raise DataError(f"{document.path} is compressed and holds no records: decompress texts first")
    check_single_file(document)


def _hashes(
    config: CorpusConfig, path: str | None, documents: Sequence[Document], kinds: dict[Document, Kind | None]
) -> dict[Document, str | None]:
    """Return each document's hash; None where it is empty, or a text that is not UTF-8."""
    named = {document.name: document for document in documents}
    corpus = Path(path).expanduser().absolute() if path else "Python"
    known = KnownFiles(cache_dir(config), f"sources of {corpus}")

    def digest(name: str) -> str | None:
        document = named[name]
        return document.digest() if kinds[document] is None else _digest_of_bytes(document)

    found = known.values({name: document.path for name, document in named.items()}, digest)
    return {document: found[name] for name, document in named.items()}


def _digest_of_bytes(document: Document) -> str | None:
    digest = hashlib.sha256(f"{document.name}\0records\0".encode())
    with document.open() as file:
        size = 0
        while block := file.read(1 << 20):
            digest.update(block)
            size += len(block)
    return digest.hexdigest() if size else None
