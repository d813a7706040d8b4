"""Images with labels: files in folders, and those that are in memory."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hvdtrain.data.image_decoding import in_rgb, open_image


class ImageSource(Protocol):
    """Images with labels, by their numbers."""

    classes: tuple[str, ...]
    """Names of the classes; a label is the place of one."""
    labels: Tensor
    """int64 `(n,)`."""

    def open(self, index: int) -> Any:
        """Return an image of PIL in RGB.

        Raises:
            Exception: whatever reading it raises.
        """
        ...

    def name(self, index: int) -> str:
        """Return what a person calls the image."""
        ...

    def fingerprint(self) -> str:
        """Return what changes when the images do."""
        ...


class FolderImages:
    """Image files. Their names are kept in one piece: millions of them are cheap, and quickly sent to workers.

    Args:
        folder: where they lie.
        names: paths in it.
        labels: the class of each.
        classes: names of the classes.
    """

    def __init__(self, folder: Path, names: Sequence[str], labels: Sequence[int], classes: tuple[str, ...]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self.folder, self.classes = folder, classes
        self.labels = torch.tensor(labels, dtype=torch.int64)
        self._names = b"".join(encoded)
        self._ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)

    def open(self, index: int) -> Any:
        """Read and decode a file, as torchvision does, but upright where its EXIF says how it lies."""
        with Path(self.name(index)).open("rb") as file:
            return in_rgb(open_image(file))

    def name(self, index: int) -> str:
        """Return the path of an image."""
        start = self._ends[index - 1] if index else 0
        return str(self.folder / os.fsdecode(self._names[start : self._ends[index]]))

    def fingerprint(self) -> str:
        """Return a hash of all names and classes; some of the images themselves are compared by the trainer."""
        digest = hashlib.blake2b("\0".join(self.classes).encode("utf-8", "surrogateescape"), digest_size=16)
        for part in (self._names, self._ends.tobytes(), self.labels.numpy().tobytes()):
            digest.update(part)
        return digest.hexdigest()


class ImagesInMemory:
    """Images that were read before.

    Args:
        pixels: uint8 `(n, height, width, 3)`.
        labels: int64 `(n,)`.
        classes: names of the classes.
    """

    def __init__(self, pixels: NDArray[np.uint8], labels: Tensor, classes: tuple[str, ...]) -> None:
        self.pixels, self.labels, self.classes = pixels, labels, classes

    def open(self, index: int) -> Any:
        """Return an image."""
        from PIL import Image

        return Image.fromarray(self.pixels[index])

    def name(self, index: int) -> str:
        """Return its number."""
        return f"number {index}"

    def fingerprint(self) -> str:
        """Return a hash of all of them."""
        digest = hashlib.blake2b(self.labels.numpy().tobytes(), digest_size=16)
        digest.update(np.ascontiguousarray(self.pixels).data)
        return digest.hexdigest()
