"""Links to what is not there: what they stood for is never left out in silence."""

from __future__ import annotations

import os
from pathlib import Path

from hvdtrain.errors import DataError


def leads_nowhere(path: str | Path | os.DirEntry[str]) -> bool:
    """Return whether a path is a link to what is not there."""
    is_link = path.is_symlink() if isinstance(path, os.DirEntry) else Path(path).is_symlink()
    return is_link and not os.path.exists(path)  # noqa: PTH110  Path has none for entries


def refuse_link(path: str | Path) -> None:
    """Raise DataError: `path` leads nowhere, and nobody has asked for such links to be passed over."""
    raise DataError(f"{path} is a link to what is not there: what it stood for would be left out. Mend or remove it")
