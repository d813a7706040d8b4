"""The training and the held-out documents, each with a hash of its text."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path

from hvdtrain.data.config import CorpusConfig, cache_dir
from hvdtrain.data.text.corpus import (
    Document,
    check_single_file,
    find_documents,
    split_documents,
    standard_library,
)
from hvdtrain.data.text.known import KnownFiles
from hvdtrain.data.text.named_splits import split_of
from hvdtrain.data.text.records import holds_records
from hvdtrain.data.text.shared import say_shared
from hvdtrain.errors import DataError, counted
from hvdtrain.process.run_files import is_run

Hashed = dict[Document, str]
_MOST_NAMED = 3


def find_splits(config: CorpusConfig, say: Callable[[str], None]) -> tuple[Hashed, Hashed]:
    """Return the training and the held-out documents with their hashes, only those that hold UTF-8 text.

    Text is read once per host, and again only where a file has changed.

    Raises:
        DataError: there are none.
    """
    documents = _usable(config, config.path, say)
    if config.val_path:
        given = _usable(config, config.val_path, say)
        if config.path:
            say_shared((item.path for item in documents), (item.path for item in given), cache_dir(config), say)
        return documents, given
    train, held_out = split_documents([*documents], config.val_fraction)
    if config.path and len(documents) > 1:
        say_shared((item.path for item in train), (item.path for item in held_out), cache_dir(config), say)
    # A part of a document has a hash of its own.
    parts = [part for part in (*train, *held_out) if part not in documents]
    hashes = {**documents, **_hashes(config, f"parts of {_full(config.path)}", parts)}
    return {part: hashes[part] or "" for part in train}, {part: hashes[part] or "" for part in held_out}


def _usable(config: CorpusConfig, path: str | None, say: Callable[[str], None]) -> Hashed:
    """Return the documents that hold text, each with its hash."""
    documents = _texts(path, without_runs(find_documents(path), path, say), say) if path else standard_library()
    hashes = _hashes(config, f"files of {_full(path)}", documents)
    usable = {document: found for document, found in hashes.items() if found}
    if not usable:
        if len(documents) == 1:
            check_single_file(documents[0])
        raise DataError(f"{path} holds no UTF-8 text: its files are empty, or something else{_of_tokens(documents)}")
    left_out = [item.name for item, found in hashes.items() if not found and item.path.stat().st_size > 0]
    if left_out and path:
        say(
            f"left out {of_all(left_out, documents)} of {path}, not being UTF-8 text{such_as(left_out)}"
            f"{_of_tokens(documents)}"
        )
    return usable


def _of_tokens(documents: Sequence[Document]) -> str:
    """Return how files of tokens are named, where a directory has some."""
    tokens = [str(item.path) for item in documents if item.path.suffix == ".bin"]
    if not tokens:
        return ""
    val = next((name for name in tokens if split_of(Path(name).name) in ("validation", "test")), "val.bin")
    train = next((name for name in tokens if name != val), tokens[0])
    return f"; a file of tokens is named itself, as in --data.path {train} --data.val-path {val}"


def _texts(path: str, documents: list[Document], say: Callable[[str], None]) -> list[Document]:
    """Return the documents without files of records, which are none of text, by their names."""
    texts = [document for document in documents if not holds_records(document.path)]
    if not texts:
        raise DataError(f"{path} holds records, and this recipe takes texts: the recipe hf trains on records")
    if len(texts) < len(documents):
        kept = set(texts)
        records = [item.name for item in documents if item not in kept]
        say(f"left out {of_all(records, documents)} of {path}, being records, for the recipe hf{such_as(records)}")
    return texts


def without_runs(documents: list[Document], path: str, say: Callable[[str], None]) -> list[Document]:
    """Return the documents but for those in directories of runs.

    Whoever trains in a folder of texts, as with `--data.path .`, has his runs below it: each would train on the logs
    of those before, and none could go on, as its data had changed.
    """
    root = Path(path).expanduser()
    known: dict[Path, bool] = {}

    def lies_in_a_run(folder: Path) -> bool:
        if folder == root or folder == folder.parent:
            return False
        if folder not in known:
            known[folder] = is_run(folder) or lies_in_a_run(folder.parent)
        return known[folder]

    kept = [item for item in documents if not lies_in_a_run(item.path.parent)]
    if 0 < len(kept) < len(documents):
        say(f"left out {len(documents) - len(kept):,} of {counted(len(documents), 'file')} of {path}: they are of runs")
    return kept or documents


def of_all(some: Sequence[str], documents: Sequence[Document]) -> str:
    """Return "2 of 5 files"."""
    return f"{len(some):,} of {counted(len(documents), 'file')}"


def such_as(names: Sequence[str]) -> str:
    """Return some names, to be looked at; all where they are few."""
    return f": {', '.join(names)}" if len(names) <= _MOST_NAMED else f", such as {', '.join(names[:_MOST_NAMED])}"


def _hashes(config: CorpusConfig, corpus: str, documents: Sequence[Document]) -> dict[Document, str | None]:
    """Return each document's hash, None where it holds no UTF-8 text."""
    named = {f"{document.name} {document.start} {document.stop}": document for document in documents}
    known = KnownFiles(cache_dir(config), corpus)
    found = known.values({key: item.path for key, item in named.items()}, lambda key: named[key].digest())
    return {document: found[key] for key, document in named.items()}


def _full(path: str | None) -> str:
    """Return what names a corpus on this host."""
    return str(Path(path).expanduser().absolute()) if path else sysconfig.get_path("stdlib")
