"""Splits that a folder of records names itself, as the datasets library writes and reads them.

A split is named by a directory (`train/`, as `save_to_disk` writes), or by a file's name (`train.jsonl`,
`data/validation-00000-of-00002.parquet`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from hvdtrain.data.text.corpus import Document
from hvdtrain.errors import DataError, counted
from hvdtrain.settings.untrusted import read_json

_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval", "evaluation"),
    "test": ("test", "testing"),
}
SPLITS = {name: split for split, names in _NAMES.items() for name in names}
"""What a split may be called -> "train", "validation" or "test"."""


@dataclass(frozen=True)
class NamedSplits:
    """The documents of a folder by its own splits."""

    train: list[Document]
    """Those of the training split, and those of none."""
    held_out: list[Document]
    about: str
    """What a person should know."""


def split_of(name: str) -> str | None:
    """Return "train", "validation" or "test" where a document's path, with slashes, says so; else None."""
    *folders, file = PurePosixPath(name).parts
    for folder in folders:
        if folder.lower() in SPLITS:
            return SPLITS[folder.lower()]
    words = [word for word in re.split(r"[-_.]", file.lower()) if word in SPLITS]
    return SPLITS[words[0]] if words else None


def named_splits(documents: Sequence[Document]) -> NamedSplits | None:
    """Return the splits that the names of documents make; None unless there is one for training and another one.

    What is held out is the validation split, or the test split where there is no other. A test split beside one is left
    out: nothing may be learned from it.
    """
    splits: dict[str | None, list[Document]] = {}
    for document in documents:
        splits.setdefault(split_of(document.name), []).append(document)
    held_out = next((name for name in ("validation", "test") if name in splits), None)
    if held_out is None or "train" not in splits:
        return None
    about = f"held out is the {held_out} split that the folder names ({counted(len(splits[held_out]), 'file')})"
    if held_out == "validation" and "test" in splits:
        about += f"; left out is its test split ({counted(len(splits['test']), 'file')})"
    train = [document for document in documents if split_of(document.name) in ("train", None)]
    return NamedSplits(train, splits[held_out], about)


def listed(documents: Sequence[Document]) -> list[Document]:
    """Return the documents without those that `save_to_disk` has not written, such as caches of `map` beside its data.

    Raises:
        DataError: a file that a data set names is not there.
    """
    files = {folder: _files_of(folder) for folder in {document.path.parent for document in documents}}
    here = {document.path for document in documents}
    for folder, names in files.items():
        missing = [name for name in names or () if folder / name not in here]
        if missing:
            raise DataError(
                f"{folder / missing[0]} is not there, which {folder / 'state.json'} names: the copy is damaged"
            )
    return [
        document
        for document in documents
        if (names := files[document.path.parent]) is None or document.path.name in names
    ]


def _files_of(folder: Path) -> set[str] | None:
    """Return the files that hold the data of a data set that was saved; None where this is none."""
    path = folder / "state.json"
    if not path.is_file():
        return None
    files: Any = read_json(path).get("_data_files")
    if not isinstance(files, list):
        return None  # a file of that name of something else
    return {str(file["filename"]) for file in files if isinstance(file, dict) and "filename" in file}
