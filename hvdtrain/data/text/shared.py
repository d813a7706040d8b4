"""Held-out files that are trained on, too: what is measured on them says nothing of other data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from hvdtrain.data.text.known import KnownFiles
from hvdtrain.errors import counted
from hvdtrain.settings.files import sha256_of

_MOST_NAMED = 3


def say_shared(train: Iterable[Path], held_out: Iterable[Path], cache: Path, say: Callable[[str], None]) -> None:
    """Say which held-out files are among those for training, or equal one of them byte for byte.

    Only files of one size are read, once per host.

    Args:
        train: whole files.
        held_out: likewise.
        cache: where hashes are kept.
        say: is told; nothing where no file is shared.
    """
    by_size: dict[int, list[Path]] = {}
    for path in train:
        by_size.setdefault(path.stat().st_size, []).append(path)
    asked = {path: by_size.get(path.stat().st_size, []) for path in held_out}
    paths = {path.absolute() for path, others in asked.items() if others and path.stat().st_size}
    paths |= {other.absolute() for path, others in asked.items() if path.absolute() in paths for other in others}
    if not paths:
        return
    named = {str(path): path for path in sorted(paths)}
    known = KnownFiles(cache, f"contents of {' '.join(named)}")
    hashes = known.values(named, lambda name: sha256_of(named[name]))
    of_training = {hashes[str(path.absolute())] for others in asked.values() for path in others if path.stat().st_size}
    shared = [str(path) for path in asked if hashes.get(str(path.absolute())) in of_training]
    say_of(shared, len(asked), say)


def say_of(shared: list[str], count: int, say: Callable[[str], None]) -> None:
    """Say that so many held-out files are trained on, too; nothing where there are none."""
    if shared:
        names = ", ".join(shared[:_MOST_NAMED]) + ", ..." * (len(shared) > _MOST_NAMED)
        say(
            f"{len(shared):,} of {counted(count, 'held-out file')} {'is' if len(shared) == 1 else 'are'} trained on,"
            f" too: {names}; held-out figures say little of other data then"
        )
