"""Files that a pattern matches, where links may lead in circles."""

from __future__ import annotations

import errno
import fnmatch
import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

_ANY_DEPTH = "**"


def matching(pattern: str | Path) -> list[Path]:
    """Return what a pattern matches, in no order; `**` stands for folders of any depth, none of them within itself.

    Python's own `glob` follows links there: of two that lead to a folder above, it does not come to an end.
    """
    parts = Path(pattern).parts
    if _ANY_DEPTH not in parts:
        return [Path(match) for match in glob.glob(str(pattern))]  # noqa: PTH207
    first = parts.index(_ANY_DEPTH)
    bases = matching(Path(*parts[:first])) if first else [Path()]
    found = {match for base in bases if base.is_dir() for match in _below(base, parts[first:], ())}
    return [Path(match) for match in found]


def is_folder(entry: os.DirEntry[str], follow: bool = True) -> bool:
    """Return whether an entry is a directory, or a link to one; a link to itself is none."""
    try:
        return entry.is_dir(follow_symlinks=follow)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return False


def _below(folder: Path, parts: Sequence[str], above: tuple[tuple[int, int], ...]) -> Iterator[Path]:
    """Yield what the parts of a pattern match in a folder.

    Args:
        folder: where to look.
        parts: what is left of the pattern.
        above: the folders that `**` has led through, by device and inode.
    """
    part, rest = parts[0], parts[1:]
    if part != _ANY_DEPTH:
        for place in _entries(folder, part):
            if not rest:
                yield place
            elif place.is_dir():
                yield from _below(place, rest, ())
        return
    about = folder.stat()
    if (here := (about.st_dev, about.st_ino)) in above:
        return
    yield from _below(folder, rest or ("*",), ())
    for place in _entries(folder, "*"):
        if place.is_dir():
            yield from _below(place, parts, (*above, here))


def _entries(folder: Path, part: str) -> list[Path]:
    """Return what of a folder a part of a pattern matches; hidden things only where it begins like one."""
    try:
        names = [path.name for path in folder.iterdir()]
    except OSError:
        return []  # whoever reads the files says that a folder cannot be listed
    names = fnmatch.filter(names, part)
    return [folder / name for name in names if part.startswith(".") or not name.startswith(".")]
