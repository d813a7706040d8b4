"""Finding images: files in a folder for each class, and CIFAR-10."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from hvdtrain.data.image_sources import FolderImages, ImagesInMemory, ImageSource
from hvdtrain.data.images_config import ImagesConfig
from hvdtrain.data.links import leads_nowhere, refuse_link
from hvdtrain.data.matching import is_folder
from hvdtrain.data.text.named_splits import SPLITS
from hvdtrain.data.torchvision_import import import_torchvision
from hvdtrain.errors import DataError, one_line, reason_of

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Of files that are taken for images, as torchvision does."""
_TRAIN, _HELD_OUT = "train", ("val", "valid", "validation", "test")
# Kinds of other files that are named.
_MOST_KINDS = 5


@dataclass(frozen=True)
class Images:
    """Training images and held-out ones, and what a person should know of them."""

    train: ImageSource
    held_out: ImageSource
    about: str = ""


def find_images(config: ImagesConfig) -> Images:
    """Return the images that the settings speak of.

    Raises:
        DataError: they are not there.
    """
    if config.root is None:
        raise DataError("give --data.root DIR, a directory of images, or --data.synthetic")
    root = Path(config.root).expanduser()
    if config.dataset == "cifar10":
        return Images(_cifar10(root, train=True), _cifar10(root, train=False))
    return _folders(root, config.val_fraction, may_skip=config.on_error == "skip")


def _folders(root: Path, val_fraction: float, may_skip: bool) -> Images:
    for name in (_TRAIN, *_HELD_OUT):
        if leads_nowhere(root / name):
            refuse_link(root / name)
    inner = root / _TRAIN if (root / _TRAIN).is_dir() else root
    classes = _classes_in(inner)
    if inner == root:
        _check_are_classes(root, classes)
    names, labels, others = _list(inner, classes, may_skip)
    held_out = next((root / name for name in _HELD_OUT if (root / name).is_dir()), None) if inner != root else None
    if held_out is not None:
        unknown = sorted({*_classes_in(held_out)} - {*classes})
        if unknown:
            raise DataError(f"{held_out / unknown[0]} is a class that {inner} does not have: remove or rename it")
        val_names, val_labels, more = _list(held_out, classes, may_skip)
        others += more
    else:
        held_out, parts = inner, [_place(name) < val_fraction for name in names]
        val_names, val_labels = _those(names, labels, parts, True)
        names, labels = _those(names, labels, parts, False)
    _check_some(inner, classes, labels, held_out, val_names)
    about = _about(others) + _without(classes, val_labels)
    if inner != root:
        about += _unused(root, {_TRAIN, held_out.name})
    return Images(
        FolderImages(inner, names, labels, classes),
        FolderImages(held_out, val_names, val_labels, classes),
        about,
    )


def _check_are_classes(root: Path, folders: tuple[str, ...]) -> None:
    """Raise DataError where all folders are called as splits are, but otherwise than here: they are no classes."""
    if len(folders) > 1 and all(folder.lower() in SPLITS for folder in folders):
        raise DataError(
            f"the folders of {root}, {' and '.join(folders)}, have the names of splits, not of classes: call the one"
            f" for training {_TRAIN}, and what is held out {_HELD_OUT[0]}"
        )


def _without(classes: tuple[str, ...], val_labels: list[int]) -> str:
    """Return which classes have no held-out images, as far as a person reads them."""
    there = set(val_labels)
    missing = [name for label, name in enumerate(classes) if label not in there]
    if not missing:
        return ""
    return f"; nothing is held out of {len(missing):,} of {len(classes):,} classes ({_some(missing)})"


def _unused(root: Path, used: set[str]) -> str:
    """Return which folders stand beside those that are used."""
    others = sorted(entry.name for entry in _seen_in(root) if is_folder(entry) and entry.name not in used)
    if not others:
        return ""
    return f"; not used: the {'folder' if len(others) == 1 else 'folders'} {_some(others)}"


def _about(others: Counter[str]) -> str:
    """Return what a person should know of files that were taken for no images, counted by their endings."""
    if not others:
        return ""
    kinds = [kind for kind, _ in others.most_common()]
    return f"; {others.total():,} other files were passed over ({_some(kinds)})"


def _some(names: list[str]) -> str:
    return ", ".join(names[:_MOST_KINDS]) + ", ..." * (len(names) > _MOST_KINDS)


def _those(names: list[str], labels: list[int], parts: list[bool], part: bool) -> tuple[list[str], list[int]]:
    chosen = [i for i, own in enumerate(parts) if own == part]
    return [names[i] for i in chosen], [labels[i] for i in chosen]


def _check_some(inner: Path, classes: tuple[str, ...], labels: list[int], held_out: Path, val_names: list[str]) -> None:
    """Raise DataError where a class has no images to train on, or nothing is held out."""
    if len(classes) == 1:
        raise DataError(
            f"{inner} has one class alone, {classes[0]}: there is nothing to tell apart; a folder for each class is"
            " needed, as in ROOT/train/CLASS/NAME.jpg"
        )
    there = set(labels)
    empty = [name for label, name in enumerate(classes) if label not in there]
    if empty:
        raise DataError(
            f"{inner / empty[0]} holds no training images ({', '.join(EXTENSIONS)}): a folder for each class is needed,"
            " as in ROOT/train/CLASS/NAME.jpg; of a few images all may be held out, with a smaller --data.val-fraction"
            " fewer"
        )
    if not val_names:
        raise DataError(
            f"{held_out} has no images to hold out: put some into {_HELD_OUT[0]}/CLASS/ beside {_TRAIN}/, or hold out"
            " more of them with --data.val-fraction"
        )


def _classes_in(folder: Path) -> tuple[str, ...]:
    try:
        entries = _seen_in(folder)
        classes = sorted(entry.name for entry in entries if is_folder(entry))
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {reason_of(error)}") from error
    for entry in entries:
        if leads_nowhere(entry):  # it may have been a class
            refuse_link(entry.path)
    if not classes:
        raise DataError(f"{folder} has no folders: one for each class is needed, as in ROOT/train/CLASS/NAME.jpg")
    return tuple(classes)


def _seen_in(folder: str | Path) -> list[os.DirEntry[str]]:
    """Return what a folder holds; what is hidden is left out."""
    with os.scandir(folder) as entries:
        return [entry for entry in entries if not entry.name.startswith(".")]


def _list(folder: Path, classes: tuple[str, ...], may_skip: bool) -> tuple[list[str], list[int], Counter[str]]:
    """Return paths in `folder` and labels of all images, class by class, and the endings of all other files.

    Where images may be skipped, a link to what is not there is one that cannot be read.

    Raises:
        DataError: a folder cannot be read, or a link leads nowhere.
    """
    names: list[str] = []
    labels: list[int] = []
    try:
        others = Counter(_ending(entry.name) for entry in _seen_in(folder) if not is_folder(entry))
        for label, name in enumerate(classes):
            images: list[str] = []
            for file, entry in _files_in(folder, name, set()):
                is_lost = leads_nowhere(entry)
                if is_lost and not may_skip:
                    raise DataError(
                        f"{entry.path} is a link to what is not there: mend or remove it, or pass over such"
                        " images with --data.on-error skip"
                    )
                if file.lower().endswith(EXTENSIONS) and (is_lost or entry.is_file()):
                    images.append(file)
                else:
                    others[_ending(file)] += 1
            names += sorted(images)
            labels += [label] * len(images)
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read: {reason_of(error)}") from error
    return names, labels, others


def _ending(name: str) -> str:
    return Path(name).suffix.lower() or "without an ending"


def _files_in(folder: Path, inside: str, seen: set[tuple[int, int]]) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Yield the paths in `folder` of what lies below `inside`; links are followed, into each folder once."""
    place = folder / inside
    if not place.is_dir():
        return
    about = place.stat()
    if (about.st_dev, about.st_ino) in seen:
        return
    seen.add((about.st_dev, about.st_ino))
    for entry in _seen_in(place):
        name = f"{inside}/{entry.name}"
        if is_folder(entry):
            yield from _files_in(folder, name, seen)
        else:
            yield name, entry


def _place(name: str) -> float:
    """Return a number from 0 to 1 that belongs to a name."""
    digest = hashlib.blake2b(os.fsencode(name), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


def _cifar10(root: Path, train: bool) -> ImagesInMemory:
    """Read CIFAR-10; torchvision unpickles its files only where their checksums are those of the originals."""
    datasets = import_torchvision("torchvision.datasets")
    try:
        data = datasets.CIFAR10(str(root), train=train)
    except Exception as error:  # torchvision's reader fails in many ways
        raise DataError(
            f"CIFAR-10 cannot be read from {root} ({one_line(error)}): put the"
            " folder cifar-10-batches-py of cifar-10-python.tar.gz into it"
        ) from error
    return ImagesInMemory(data.data, torch.tensor(data.targets, dtype=torch.int64), tuple(data.classes))
