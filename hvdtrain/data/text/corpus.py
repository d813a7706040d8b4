"""The documents of a corpus: which files they are, how they are split, and reading them as UTF-8."""

from __future__ import annotations

import glob
import hashlib
import os
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from hvdtrain.data.links import leads_nowhere, refuse_link
from hvdtrain.data.matching import is_folder, matching
from hvdtrain.data.text.encodings import how_to_convert, text_of
from hvdtrain.errors import DataError, reason_of
from hvdtrain.settings import nearest

PIECE_BYTES = 1 << 20


class NotTextError(DataError):
    """A file that is not UTF-8."""


@dataclass(frozen=True)
class Document:
    """A file of text, or a part of one.

    `name` is its path below the corpus: the same on every machine, it decides the order and the split.
    """

    name: str
    path: Path
    start: int = 0
    stop: int | None = None

    def open(self) -> BinaryIO:
        """Return the file, to be read from its beginning.

        Raises:
            DataError: it may not be read: that is not to be taken for a file without text.
        """
        try:
            return self.path.open("rb")
        except OSError as error:
            raise DataError(
                f"{self.path} cannot be read ({reason_of(error)}): give the right to read it, or keep it elsewhere"
            ) from error

    def pieces(self) -> Iterator[str]:
        """Yield the text in pieces that end with a line, of about a megabyte: a file may be larger than memory.

        Raises:
            DataError: the file cannot be read, or is not UTF-8 (`NotTextError`); names the place.
        """
        with self.open() as file:
            file.seek(self.start)
            done = 0
            while raw := self._next(file):
                try:
                    text = text_of(raw)
                except UnicodeDecodeError as error:
                    raise NotTextError(
                        f"{self.path} is not UTF-8 text (byte {self.start + done + error.start:,}):"
                        f" {how_to_convert(raw)}; token files are named *.bin"
                    ) from error
                yield text
                done += len(raw)

    def _next(self, file: BinaryIO) -> bytes:
        """Return the next piece: whole lines or, of a line that is too long, whole characters."""
        left = sys.maxsize if self.stop is None else self.stop - file.tell()
        raw = file.read(min(PIECE_BYTES, left))
        left -= len(raw)
        if len(raw) == PIECE_BYTES and left > 0:
            raw += file.readline(min(PIECE_BYTES, left))
            for _ in range(3):  # UTF-8 continues a character with bytes 10xxxxxx, three at most
                following = file.peek(1)[:1]  # type: ignore[attr-defined]
                if raw.endswith(b"\n") or not following or following[0] & 0xC0 != 0x80:
                    break
                raw += file.read(1)
        return raw

    def digest(self) -> str | None:
        """Return a hash of name and text; None where there is no text, or none that is UTF-8."""
        digest = hashlib.sha256(f"{self.name}\0".encode())
        is_empty = True
        try:
            for piece in self.pieces():
                digest.update(piece.encode())
                is_empty = False
        except NotTextError:
            return None
        return None if is_empty else digest.hexdigest()


def standard_library() -> list[Document]:
    """Return the source code of the running Python's standard library, without tests and installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    return [
        document for document in _below(root, ".py", follow=False) if not left_out & set(Path(document.name).parts[:-1])
    ]


def find_documents(path: str, lost: Callable[[str], None] = refuse_link) -> list[Document]:
    """Return the documents that a file, a directory or a glob names, sorted by name.

    Args:
        path: what names them.
        lost: is told of each link that leads nowhere; refuses it unless it is to be passed over.

    Raises:
        DataError: there are none, which names the nearest thing that exists; a directory may not be read; or a file's
            name is no text.
    """
    place = Path(path).expanduser()
    if place.is_file():
        return [Document(place.name, place)]
    if place.is_dir():
        found = _below(place, lost=lost)
        if not found:
            raise DataError(
                f"the directory {path} holds no files: --data.path takes a text file, a directory or a glob"
            )
        return _with_names(found)
    globbed = matching(place)
    for match in filter(leads_nowhere, globbed):
        lost(str(match))
    matches = sorted(match for match in globbed if match.is_file())
    _check_readable(place)
    if matches:
        base = Path(*_common(matches))
        return _with_names([Document(match.relative_to(base).as_posix(), match) for match in matches])
    raise DataError(_explain_missing(path, place))


def _with_names(documents: list[Document]) -> list[Document]:
    """Return the documents, whose names are text: they decide on which side each is, and libraries open them by name.

    Raises:
        DataError: one's name is not UTF-8.
    """
    for document in documents:
        try:
            document.name.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"the name of the file {str(document.path)!a} is not UTF-8: rename it") from error
    return documents


def split_documents(documents: list[Document], val_fraction: float) -> tuple[list[Document], list[Document]]:
    """Split into training and held-out documents, at least one each, by a hash of their names.

    The hash does not know the machine or the other files, so a file stays on its side when the corpus grows. A single
    file is cut instead: its last `val_fraction` is held out, from the start of a line on.
    """
    if len(documents) == 1:
        return _cut(documents[0], val_fraction)
    ranked = sorted(documents, key=lambda document: _position(document.name))
    below = sum(_position(document.name) < val_fraction for document in ranked)
    num_held_out = min(max(1, below), len(ranked) - 1)
    held_out = {document.name for document in ranked[:num_held_out]}
    return (
        [document for document in documents if document.name not in held_out],
        [document for document in documents if document.name in held_out],
    )


def read_all(documents: Iterable[Document]) -> Iterator[tuple[bool, str]]:
    """Yield the documents piece by piece, each with whether a document begins with it; empty ones are left out."""
    for document in documents:
        for i, piece in enumerate(document.pieces()):
            yield i == 0, piece


def check_single_file(document: Document) -> None:
    """Raise DataError where the one file that a user named is not UTF-8; names the place."""
    for _ in document.pieces():
        pass


def _below(
    root: Path, suffix: str = "", follow: bool = True, lost: Callable[[str], None] = lambda path: None
) -> list[Document]:
    """Return the files in a directory and those below it, sorted by name; hidden ones are left out.

    Args:
        root: the directory.
        suffix: of the files' names.
        follow: look into directories that are links, too; none is looked into within itself.
        lost: is told of each link that leads nowhere.
    """
    above = (_inode(root),) if follow else ()
    found = [Document(name, root / name) for name in _names(str(root), "", above, lost) if name.endswith(suffix)]
    return sorted(found, key=lambda document: document.name)


def _names(folder: str, prefix: str, above: tuple[tuple[int, int], ...], lost: Callable[[str], None]) -> Iterator[str]:
    """Yield the paths of files below `folder`.

    Args:
        folder: where to look.
        prefix: its path, with a slash at the end.
        above: it and the directories that it lies in; none where links are not followed.
        lost: is told of each link that leads nowhere.

    Raises:
        DataError: a directory may not be read: what is in it would be left out in silence.
    """
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if is_folder(entry, follow=bool(above)):
                    here = (_inode(Path(entry.path)),) if above else ()
                    if not set(here) & set(above):
                        yield from _names(entry.path, f"{prefix}{entry.name}/", above + here, lost)
                elif leads_nowhere(entry):
                    lost(entry.path)
                elif entry.is_file():
                    yield f"{prefix}{entry.name}"
                elif above:
                    raise DataError(
                        f"{entry.path} is no regular file, but a pipe, a socket or a device: remove it, or keep it"
                        " elsewhere"
                    )
    except OSError as error:
        raise _unreadable(folder, reason_of(error)) from error


def _unreadable(folder: str, reason: str) -> DataError:
    return DataError(
        f"the directory {folder} of the data cannot be listed ({reason}): what is in it would be left out. Give the"
        " right to read it, or keep it elsewhere"
    )


def _check_readable(pattern: Path) -> None:
    """Raise DataError where a glob has left out a directory because it may not be read."""
    for part in [above for above in pattern.parents if glob.has_magic(str(above))]:
        for folder in matching(part):
            if folder.is_dir() and not os.access(folder, os.R_OK | os.X_OK):
                raise _unreadable(str(folder), "Permission denied")


def _inode(folder: Path) -> tuple[int, int]:
    found = folder.stat()
    return found.st_dev, found.st_ino


def _common(paths: list[Path]) -> tuple[str, ...]:
    """Return the parts of the directory that holds all paths."""
    parents = [path.parent.parts for path in paths]
    shared = []
    for parts in zip(*parents, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return tuple(shared)


def _explain_missing(path: str, place: Path) -> str:
    if leads_nowhere(place):
        return f"--data.path {path} is a link to {place.readlink()}, which is not there: mend it"
    if any(character in path for character in "*?["):
        return f"no file matches --data.path {path}"
    siblings = [item.name for item in place.parent.iterdir()] if place.parent.is_dir() else []
    hint = nearest(place.name, siblings) if siblings else ""
    return f"--data.path {path} does not exist{hint if 'did you mean' in hint else ''}"


def _cut(document: Document, val_fraction: float) -> tuple[list[Document], list[Document]]:
    size = document.path.stat().st_size
    with document.path.open("rb") as file:
        file.seek(int(size * (1 - val_fraction)))
        file.readline()
        at = file.tell()
    if not 0 < at < size:  # one long line: cut between two characters instead
        at = int(size * (1 - val_fraction))
        with document.path.open("rb") as file:
            file.seek(at)
            # UTF-8 continues a character with bytes 10xxxxxx, three at most.
            at += next((i for i, byte in enumerate(file.read(4)) if byte & 0xC0 != 0x80), 0)
    first = Document(document.name, document.path, 0, at)
    return [first], [Document(document.name, document.path, at, size)]


def _position(name: str) -> float:
    """Map a name to [0, 1), evenly."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") / 2**64
