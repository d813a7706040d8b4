"""A file with the state of a loop of the user's own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hvdtrain.errors import UsageError, one_line
from hvdtrain.settings.files import replaced_whole, telling_why


def write_state(state: Mapping[str, Any], path: Path) -> None:
    """Write what `read_state` can read again; what was there before stays until the new file is whole.

    Numbers of numpy are written as plain ones.

    Raises:
        UsageError: it cannot be written, or could not be read again.
    """
    if not isinstance(state, Mapping):
        raise UsageError(f"save() takes a dictionary, such as {{'model': model.state_dict()}}, not {_kind(state)}")
    try:
        with replaced_whole(path) as temporary:
            _write(_plain(dict(state)), temporary, path)
    except (OSError, RuntimeError) as error:  # torch tells of a missing folder, or a full disk, by a RuntimeError
        raise UsageError(f"{path} cannot be written: {one_line(error)}") from error


def _write(state: dict[str, Any], temporary: Path, path: Path) -> None:
    """Write a file and look whether it can be read: what only `load` finds, long afterwards, is found too late."""
    try:
        with telling_why(temporary):
            torch.save(state, temporary)
        torch.load(temporary, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError):
        raise
    except Exception as error:  # pickle has many
        raise UsageError(
            f"{path} is not written, as load() could not read it: {_odd(state, 'state') or one_line(error)}; save"
            " numbers, texts, tensors, and lists and dictionaries of them"
        ) from error


def _plain(value: Any) -> Any:
    """Return nested values with Python's numbers in place of numpy's; of other kinds the objects that they are."""
    if isinstance(value, np.generic):
        return value.item()
    if type(value) is dict:
        return {_plain(key): _plain(item) for key, item in value.items()}
    return type(value)(map(_plain, value)) if type(value) in (list, tuple) else value


def _odd(value: Any, place: str) -> str:
    """Return where in nested values something stands that is neither tensor nor plain, and what it is."""
    if isinstance(value, Mapping):
        found = (_odd(item, f"{place}[{key!r}]") for key, item in value.items())
        return next(filter(None, found), "")
    if isinstance(value, list | tuple):
        return next(filter(None, (_odd(item, f"{place}[{i}]") for i, item in enumerate(value))), "")
    is_known = isinstance(value, Tensor | torch.dtype | torch.device) or type(value) in _KNOWN
    return "" if is_known else f"{place} is {_kind(value)}"


_KNOWN = (bool, int, float, complex, str, bytes, type(None))


def _kind(value: Any) -> str:
    return f"of type {type(value).__module__}.{type(value).__qualname__}"


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
        raise UsageError(f"{path} cannot be read as tensors and plain values: {one_line(error)}") from error
