"""Images in memory: the MNIST family, decoded once and batched as whole tensors."""

from __future__ import annotations

import contextlib
import hashlib
import io
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hvdtrain.data.config import DatasetName, VisionConfig
from hvdtrain.data.torchvision_import import import_torchvision
from hvdtrain.errors import DataError, one_line
from hvdtrain.settings.files import locked

_CLASSES: dict[DatasetName, str] = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}
_FILES = tuple(f"{split}-{kind}-ubyte" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))


class ImageTensors:
    """Grey images and their labels, held in memory.

    Args:
        images: uint8 `(n, height, width)`.
        labels: int64 `(n,)`.
    """

    reads_ahead = True
    is_in_memory = True

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        if images.dtype != torch.uint8 or images.dim() != 3 or labels.shape != images.shape[:1]:
            raise ValueError(
                f"uint8 (n, height, width) and (n,) are needed, not {images.dtype} {tuple(images.shape)}"
                f" and {tuple(labels.shape)}"
            )
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return the samples `indices`, int64 `(n,)`.

        Returns:
            Images, fp32 `(n, 1, height, width)`, brought from 0..255 to -1..1 (mean 0.5 and standard deviation 0.5 of
            a scale from 0 to 1), and labels, int64 `(n,)`.
        """
        pixels = self.images.index_select(0, indices).unsqueeze(1).float()
        # Bitwise (pixels / 255 - 0.5) / 0.5, in a pass less: halving and doubling are exact.
        return pixels.div_(127.5).sub_(1), self.labels.index_select(0, indices)

    def num_targets(self, indices: Tensor) -> int:
        """Return one a sample."""
        return indices.numel()

    def fingerprint(self) -> str:
        """Return a hash of all images and labels, by which a resumed run knows its data again."""
        digest = hashlib.blake2b(repr(tuple(self.images.shape)).encode(), digest_size=16)
        digest.update(self.images.contiguous().numpy().data)
        digest.update(self.labels.contiguous().numpy().data)
        return digest.hexdigest()


def load_images(config: VisionConfig, *, train: bool) -> ImageTensors:
    """Load the training images, or the test images, of a data set; download them first if asked to.

    Every process may call this at the same time: one downloads, the others on that host wait for it. The directory
    is written to only when files are missing and `config.download` is set.

    Raises:
        DataError: torchvision or files are missing, a file is damaged, or the download failed.
    """
    datasets = import_torchvision("torchvision.datasets")
    dataset_class = getattr(datasets, _CLASSES[config.dataset])
    root = Path(config.root).expanduser()
    raw = root / _CLASSES[config.dataset] / "raw"
    if _missing(raw):
        if not config.download:
            raise DataError(_explain_missing(config, raw))
        _download(dataset_class, root, raw)
    return _read(dataset_class, root, raw, train)


def class_names(dataset: DatasetName) -> tuple[str, ...]:
    """Return what the labels 0 to 9 of a data set mean."""
    if dataset == "mnist":
        return tuple(map(str, range(10)))
    return tuple(import_torchvision("torchvision.datasets").FashionMNIST.classes)


def _missing(raw: Path) -> list[str]:
    return [name for name in _FILES if not (raw / name).is_file()]


def _explain_missing(config: VisionConfig, raw: Path) -> str:
    missing, folder = _missing(raw), raw.absolute()
    if all((raw / f"{name}.gz").is_file() for name in missing):
        return (
            f"{config.dataset}: the files in {folder} are compressed: run gunzip {folder}/*.gz, or add --data.download"
            " to fetch them anew"
        )
    return (
        f"{config.dataset}: its files are not there: add --data.download to fetch them, or name the directory above"
        f" {raw.parent.name}/raw with --data.root, or put {', '.join(missing)}, uncompressed, into {folder} yourself"
    )


def _read(dataset_class: Any, root: Path, raw: Path, train: bool) -> ImageTensors:
    split = "train" if train else "t10k"
    try:
        dataset = dataset_class(root, train=train)
        return ImageTensors(dataset.data, dataset.targets)
    except OSError as error:
        raise DataError(f"cannot read the {split} files in {raw}: {error}") from error
    except Exception as error:  # torchvision's reader fails in many ways: assertions, ValueError, RuntimeError, ...
        raise DataError(
            f"the {split} files in {raw} are damaged ({error or type(error).__name__}):"
            f" remove {raw / split}-* and add --data.download to fetch the files again"
        ) from error


def _download(dataset_class: Any, root: Path, raw: Path) -> None:
    """Fetch the files beside their place and move them there, so that no process ever sees half a file."""
    try:
        with locked(root / f".{raw.parent.name}.lock"):
            if not _missing(raw):
                return  # another process was faster
            raw.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as temporary, _silent():
                fetched = Path(dataset_class(temporary, download=True).raw_folder)
                for name in _missing(raw):
                    (fetched / name).replace(raw / name)
    except (OSError, RuntimeError) as error:  # RuntimeError: torchvision, once every mirror has failed
        raise DataError(
            f"cannot download {raw.parent.name} to {root.absolute()}: {one_line(error)}. Without a network, put"
            f" {', '.join(_FILES)} into {raw.absolute()} yourself"
        ) from error


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Hide torchvision's progress bars, which would break up the lines of other ranks."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
