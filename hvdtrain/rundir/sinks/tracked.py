"""What the sinks of trackers share: under which name a run goes on there, and images as all of them take them."""

from __future__ import annotations

import importlib
import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvdtrain.errors import ConfigError
from hvdtrain.rundir.directory import RunDirectory
from hvdtrain.settings.files import replaced_whole

_MOST_BYTES = 1 << 16
DEFAULT_PROJECT = "hvdtrain"


def library_of(name: str, flag: str, attribute: str) -> Any:
    """Return the library of a tracker.

    Args:
        name: of the library and of the extra that brings it.
        flag: the setting that asks for it.
        attribute: something that it has: a folder of the same name, which these libraries leave behind, has not.

    Raises:
        ConfigError: it is not installed.
    """
    reason = f"no module named {name!r}"
    try:
        library = importlib.import_module(name)
        if hasattr(library, attribute):
            return library
    except Exception as error:  # of any kind: it is the library's own code that fails
        reason = f"{type(error).__name__}: {error}"
    raise ConfigError(f"{flag} needs {name}, which cannot be imported here ({reason}): pip install 'hvdtrain[{name}]'")


def remembered(run: RunDirectory, tracker: str) -> str | None:
    """Return what a run is called by a tracker since an earlier start; None where nothing is known."""
    try:
        with run.trackers.open("rb") as file:
            known = json.loads(file.read(_MOST_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    name = known.get(tracker) if isinstance(known, dict) else None
    return name if isinstance(name, str) else None


def remember(run: RunDirectory, tracker: str, name: str) -> None:
    """Keep what a run is called by a tracker, for the next start.

    Raises:
        OSError: it cannot be written.
    """
    others = {other: known for other in ("wandb", "mlflow") if (known := remembered(run, other))}
    with replaced_whole(run.trackers) as temporary:
        temporary.write_text(json.dumps({**others, tracker: name}) + "\n")


def image_of(value: Any) -> NDArray[np.uint8]:
    """Return an image as uint8 `(height, width, 3)`.

    Raises:
        ValueError: it is none.
    """
    image = np.asarray(value)
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3)):
        raise ValueError(f"a sample is a text or an image, uint8 (height, width, 3), not {image.dtype} {image.shape}")
    image = image[:, :, None] if image.ndim == 2 else image
    return np.broadcast_to(image, (*image.shape[:2], 3)).copy()
