"""Names of files and directories as users give them: what no system call could do anything with is refused."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Literal

from hvdtrain.errors import ConfigError, reason_of
from hvdtrain.settings.units import shortened

PathKind = Literal[
    "file",
    "new file",
    "directory",
    "new directory",
    "file or directory",
    "data",
    "name",
    "file or name",
    "directory or name",
]
"""file: can be read. new file: can be written. directory: is there. new directory: is there, or can be made.
data: a file, a directory or a glob. name: a path or a name of something else, such as a model on a hub; with what it
must be if there is something of this name."""

_LONGEST_NAME, _LONGEST_PATH = 255, 4095


def check_path(text: str, kind: PathKind, name: str) -> None:
    """Check that `text` can be what the setting `name` needs.

    Raises:
        ConfigError: it is empty, no path at all, or names something of another kind.
    """
    if not text:
        raise ConfigError(f"{name} is empty: give a path, or leave it out")
    shown = shortened(text)
    if "\0" in text:
        raise ConfigError(f"{name} {shown!r} holds a NUL byte: no file can have this name")
    if kind.startswith("new") and any("\udc80" <= sign <= "\udcff" for sign in text):  # libraries cannot write there
        raise ConfigError(f"{name} {shown!r} is not UTF-8: give a name in plain letters")
    encoded = [len(os.fsencode(part)) for part in text.split("/")]
    if max(encoded) > _LONGEST_NAME or sum(encoded) + len(encoded) > _LONGEST_PATH:
        raise ConfigError(f"{name} {shown} is too long: a name has at most {_LONGEST_NAME} bytes")
    path = expanded(text, name)
    if kind != "name":
        _check_kind(path, kind, f"{name} {shown}")


def expanded(text: str, name: str) -> Path:
    """Return the path with `~` and `~user` replaced.

    Raises:
        ConfigError: there is no such user.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        user = text.split("/")[0]
        raise ConfigError(
            f"{name} {shortened(text)}: there is no user '{shortened(user[1:])}'; for a file of this name write ./~..."
        ) from error


def _check_kind(path: Path, kind: PathKind, what: str) -> None:
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        if kind in ("file", "directory", "file or directory"):
            raise ConfigError(f"{what} cannot be read: No such file or directory") from None
        return
    except OSError as error:
        verb = "written" if kind.startswith("new") else "read"
        raise ConfigError(f"{what} cannot be {verb}: {reason_of(error)}") from error
    is_file, is_directory = stat.S_ISREG(mode), stat.S_ISDIR(mode)
    if kind in ("file", "new file", "file or name") and not is_file:
        raise ConfigError(f"{what} is {'a directory' if is_directory else 'no regular file'}: give a file")
    if kind in ("directory", "new directory", "directory or name") and not is_directory:
        raise ConfigError(f"{what} is no directory: give a directory")
    if not is_file and not is_directory:
        raise ConfigError(f"{what} is no regular file: give a file or a directory")
    access = os.W_OK if kind == "new file" else os.R_OK
    if not os.access(path, access):
        raise ConfigError(f"{what} cannot be {'written' if access == os.W_OK else 'read'}: Permission denied")


def existing_parent(path: Path) -> Path:
    """Return the path, or the nearest directory above it that exists."""
    path = path.absolute()
    return next((folder for folder in (path, *path.parents) if folder.is_dir()), Path("/"))
