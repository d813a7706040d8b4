"""The settings of images in folders. Standard library only: the command line reads them before torch is there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from hvdtrain.settings import DataConfig, setting

_IMAGENET_SIZE, _CIFAR_SIZE = 224, 32
# What the references of torchvision resize the shorter side to, for a crop of 224 pixels.
_IMAGENET_RESIZE = 256
# Of images that are made up, nothing of these is asked for.
_OF_FILES = (
    *("root", "dataset", "val_fraction", "val_resize", "augment", "flip", "auto_augment"),
    *("random_erase", "mixup", "cutmix", "on_error", "workers"),
)


@dataclass(frozen=True, kw_only=True)
class ImagesConfig(DataConfig):
    """The images, and what is done to them before the model sees them."""

    root: str | None = setting(None, path="directory")
    """Directory of the images: ROOT/train/CLASS/... and ROOT/val/CLASS/..., or ROOT/CLASS/..., of which a part is held
    out; for cifar10 the one that holds cifar-10-batches-py."""
    dataset: Literal["folder", "cifar10"] = "folder"
    """folder: a folder for each class, as for ImageNet. cifar10: CIFAR-10's own files (the Python version)."""
    synthetic: bool = False
    """Random images that are made up in memory, to measure the speed of all but the input."""
    synthetic_images: int = setting(1280, minimum=10, maximum=10**9)
    """How many random images an epoch has; a tenth as many are held out."""
    num_classes: int = setting(1000, minimum=2, maximum=10**6)
    """Classes of random images; other data says itself how many it has."""
    val_fraction: float = setting(0.1, above=0, below=1)
    """Share of the images of a folder without val/ that is held out, chosen by a hash of their names."""
    image_size: int | None = setting(None, minimum=8, maximum=4096)
    """Height and width in pixels that the model sees. None: 224, for cifar10 32."""
    val_resize: int | None = setting(None, minimum=8, maximum=8192)
    """The shorter side is resized to this before the middle is cut out. None: 256 for 224 and in proportion, for
    cifar10 as it is."""
    augment: Literal["auto", "resized-crop", "padded-crop", "none"] = "auto"
    """resized-crop: a part of random size and place, as for ImageNet. padded-crop: moved by up to an eighth, as for
    CIFAR. none: as in evaluation. auto: resized-crop, for cifar10 padded-crop."""
    flip: float = setting(0.5, minimum=0, maximum=1)
    """Share of the training images that is mirrored."""
    auto_augment: Literal["none", "randaugment", "trivialaugment", "augmix", "imagenet", "cifar10"] = "none"
    """Colours and shapes as well: RandAugment, TrivialAugmentWide, AugMix, or the policies of AutoAugment."""
    random_erase: float = setting(0.0, minimum=0, maximum=1)
    """Share of the training images of which a random rectangle is erased (arXiv:1708.04896)."""
    mixup: float = setting(0.0, minimum=0, maximum=100)
    """Mix each training image with another one, by shares from Beta(X, X) (arXiv:1710.09412); 0: not. The other image
    is drawn from all of them, so that the mixture is the same at any number of ranks: twice as many are decoded."""
    cutmix: float = setting(0.0, minimum=0, maximum=100)
    """Put a rectangle of another image into each, its area by Beta(X, X) (arXiv:1905.04899); beside mixup, in every
    second image."""
    on_error: Literal["stop", "skip"] = "stop"
    """An image that cannot be read ends the run, or is named, counted and passed over: it adds nothing to loss and
    figures."""

    @property
    def size(self) -> int:
        """Return the height and width that the model sees."""
        if self.image_size is not None:
            return self.image_size
        return _CIFAR_SIZE if self.is_cifar else _IMAGENET_SIZE

    @property
    def resize(self) -> int:
        """Return what the shorter side is resized to in evaluation."""
        if self.val_resize is not None:
            return self.val_resize
        return self.size if self.is_cifar else round(self.size * _IMAGENET_RESIZE / _IMAGENET_SIZE)

    @property
    def augmentation(self) -> str:
        """Return what `augment` comes to."""
        if self.augment != "auto":
            return self.augment
        return "padded-crop" if self.is_cifar else "resized-crop"

    @property
    def is_cifar(self) -> bool:
        """Return whether the images are those of CIFAR-10."""
        return self.dataset == "cifar10" and not self.synthetic

    @property
    def is_mixed(self) -> bool:
        """Return whether training images are mixed with others."""
        return not self.synthetic and (self.mixup > 0 or self.cutmix > 0)

    def unused(self) -> Iterator[tuple[str, str]]:
        """Yield what only random images, or only real ones, need."""
        yield from super().unused()
        if self.synthetic:
            for name in _OF_FILES:
                yield name, "--data.synthetic makes its images up"
            return
        for name in ("synthetic_images", "num_classes"):
            yield name, "it is for --data.synthetic"
        if self.augment == "none":
            yield "flip", "--data.augment none leaves the images as in evaluation"
        if self.dataset == "cifar10":
            yield "val_fraction", "CIFAR-10 says itself what is held out"
            yield "on_error", "CIFAR-10 is read whole when the run begins"
