"""A file with the state of a loop of the user's own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hvdtrain.errors import UsageError
from hvdtrain.settings.files import replaced_whole


def write_state(state: Mapping[str, Any], path: Path) -> None:
    """Write what `torch.save` can; what was there before stays until the new file is whole.

    Raises:
        UsageError: it cannot be written.
    """
    try:
        with replaced_whole(path) as temporary:
            torch.save(dict(state), temporary)
    except (OSError, RuntimeError) as error:  # torch tells of a missing folder, or a full disk, by a RuntimeError
        raise UsageError(f"{path} cannot be written: {_first_line(error)}") from error


def read_state(path: Path) -> Any:
    """Return what `write_state` has written; runs no code of the file.

    Raises:
        UsageError: there is no such file, or it holds something else.
    """
    if not path.is_file():
        raise UsageError(f"{path} is no file: save() has not been there, or the path is another")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zipfile and torch have many
        raise UsageError(f"{path} cannot be read as tensors and plain values: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
