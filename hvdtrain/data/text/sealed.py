"""Folders of prepared tokens: written whole, and sealed, so that one that was cut or changed later is noticed.

FOLDER/seal.json        of each other file: its SHA-256, and size, times and inode as they were

Where these are as they were, so is the file: the system sets the time of the last change (ctime) itself. Otherwise, as
in a copy of the cache, its content is compared.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from hvdtrain.data.text.known import state_of
from hvdtrain.errors import DataError, reason_of
from hvdtrain.settings.files import locked, replaced_whole, sha256_of, written_whole

_SEAL = "seal.json"
_MOST_BYTES = 1 << 20


def sealed_folder(
    cache: Path, name: str, write: Callable[[Path], None], say: Callable[[str], None] = lambda text: None
) -> Path:
    """Return a folder of the cache; it is written where there is none, or none that is as it was written.

    Of several processes of a host one works, the others wait.

    Args:
        cache: directory of prepared text.
        name: of the folder in it.
        write: is given an empty folder, and writes files to it.
        say: takes that the folder was not as it was written.

    Raises:
        DataError: it cannot be written.
    """
    try:
        return _sealed(cache, name, write, say)
    except OSError as error:
        raise cannot_keep(cache, error) from error


def cannot_keep(cache: Path, error: OSError) -> DataError:
    """Return the error for prepared text that cannot be kept, with what helps."""
    is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    helps = "free some space there, or choose another" if is_full else "choose a folder of yours by"
    return DataError(f"prepared tokens cannot be kept in {cache} ({reason_of(error)}): {helps} --data.cache-dir")


def _sealed(cache: Path, name: str, write: Callable[[Path], None], say: Callable[[str], None]) -> Path:
    folder = cache / name
    cache.mkdir(parents=True, exist_ok=True)
    if not _is_whole(folder):
        with locked(cache / f"{name}.lock"):
            if not _is_whole(folder):
                if folder.exists() or folder.is_symlink():
                    say(f"warning: {folder} was changed or cut short since it was written: it is prepared again")
                    _remove(folder)
                with written_whole(folder) as new:
                    write(new)
                    _seal(new, {path.name: sha256_of(path) for path in new.iterdir()})
    return folder


def _is_whole(folder: Path) -> bool:
    """Return whether all files are as they were written; a seal that cannot be read is none."""
    try:
        path = folder / _SEAL
        if not path.is_file() or path.stat().st_size > _MOST_BYTES:
            return False
        files = json.loads(path.read_bytes())["files"]
        changed = {name: digest for name, (digest, state) in files.items() if state != state_of(folder / name)}
        for name, digest in changed.items():
            file = folder / name
            if file.parent != folder or not file.is_file() or sha256_of(file) != digest:
                return False
        if changed:  # the next start need not compare again
            with contextlib.suppress(OSError):
                _seal(folder, {name: digest for name, (digest, _) in files.items()})
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return False
    return True


def _seal(folder: Path, digests: dict[str, str]) -> None:
    files = {name: (digest, state_of(folder / name)) for name, digest in digests.items()}
    with replaced_whole(folder / _SEAL) as temporary:
        temporary.write_text(json.dumps({"files": files}))


def _remove(folder: Path) -> None:
    """Remove what has the folder's name; who has mapped its files keeps them."""
    away = folder.with_name(f"{folder.name}.changed-{os.getpid()}")
    folder.rename(away)
    if away.is_dir() and not away.is_symlink():
        shutil.rmtree(away, ignore_errors=True)
    else:
        away.unlink()
