"""Batches of images: decoded, augmented by torchvision, and left as bytes, which the model's device normalises.

A batch of bytes is a quarter of what it is as real numbers, on its way from a worker and to a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hvdtrain.data.draws import Draws, kept_random_state
from hvdtrain.data.image_sources import ImageSource
from hvdtrain.data.images_config import ImagesConfig
from hvdtrain.data.torchvision_import import import_torchvision
from hvdtrain.errors import DataError, one_line
from hvdtrain.process.output import tell

# Red, green and blue of ImageNet's training images, on a scale from 0 to 1, as torchvision's references have them.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
UNREAD = -100
"""Label of an image that could not be read; torch's cross entropy passes over it."""
_POOL = 64
# An image that is so many times as long as it is wide is cut to that, in the middle, before it is made larger: a line
# of one pixel's width would become gigabytes.
_LONGEST = 32

Transform = Callable[[Any], Tensor]


class ImageSamples:
    """A `Dataset` of images. What a sample draws is a function of (seed, epoch, sample).

    Args:
        source: the images.
        config: what is done to them.
        is_training: whether they are augmented.
    """

    def __init__(self, source: ImageSource, config: ImagesConfig, *, is_training: bool) -> None:
        self.source, self._config, self._is_training = source, config, is_training
        self._transform: Transform | None = None
        self._named: set[int] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the transform: a worker must import torchvision by `import_torchvision` first."""
        return {**self.__dict__, "_transform": None}

    def __len__(self) -> int:
        return len(self.source.labels)

    def num_targets(self, indices: Tensor) -> int:
        """Return one a sample."""
        return len(indices)

    def fingerprint(self) -> str:
        """Return what changes when the images do."""
        return self.source.fingerprint()

    def batch(self, indices: Tensor, draws: Draws | None = None) -> tuple[Tensor, ...]:
        """Return the samples `indices`, int64 `(n,)`.

        Returns:
            Images, uint8 `(n, 3, size, size)`, and labels, int64 `(n,)`, `UNREAD` where an image could not be read. Of
            mixed images also the labels of the others, int64 `(n,)`, and the images' own shares, fp32 `(n,)`.

        Raises:
            DataError: an image cannot be read, and is not to be passed over.
        """
        draws = draws or Draws(0, 0, indices)
        size = self._config.size
        is_mixed = self._is_training and self._config.is_mixed
        images = torch.zeros(len(indices), 3, size, size, dtype=torch.uint8)
        labels = torch.full((len(indices),), UNREAD)
        others, shares = labels.clone(), torch.ones(len(indices))
        with kept_random_state():
            for i, index in enumerate(indices.tolist()):
                if self._is_training:
                    draws.seed_generators(i)
                image = self._image(index)
                if image is None:
                    continue
                labels[i] = others[i] = self.source.labels[index]
                if is_mixed:
                    image, others[i], shares[i] = self._mixed(image, int(labels[i]))
                images[i] = image
        return (images, labels, others, shares) if is_mixed else (images, labels)

    def _image(self, index: int) -> Tensor | None:
        """Return an image as the model sees it, uint8 `(3, size, size)`; None where it is passed over."""
        if self._transform is None:
            self._transform = train_transform(self._config) if self._is_training else eval_transform(self._config)
        try:
            image = self.source.open(index)
        except MemoryError:
            raise
        except Exception as error:  # decoders fail in many ways
            self._pass_over(index, error)
            return None
        return self._transform(image)

    def _pass_over(self, index: int, error: Exception) -> None:
        text = f"the image {self.source.name(index)} cannot be read ({one_line(error)})"
        if self._config.on_error == "stop":
            raise DataError(f"{text}: mend or remove it, or pass over such images with --data.on-error skip") from error
        if index not in self._named:
            self._named.add(index)
            tell(f"hvdtrain: WARNING: {text}: passed over")

    def _mixed(self, image: Tensor, label: int) -> tuple[Tensor, int, float]:
        """Return an image with a part of another one, drawn from all, the other's label and its own share."""
        config = self._config
        is_cut = config.cutmix > 0 and (config.mixup == 0 or bool(torch.rand(()) < 0.5))
        alpha = config.cutmix if is_cut else config.mixup
        number = int(torch.randint(len(self), ()))
        share = float(np.random.beta(alpha, alpha))
        other = self._image(number)
        if other is None:
            return image, label, 1.0
        other_label = int(self.source.labels[number])
        if not is_cut:
            mixture = image.float().lerp_(other.float(), 1 - share).round_()
            return mixture.byte(), other_label, share
        rows, columns = _rectangle(image.shape[-1], share)
        image = image.clone()
        image[:, rows, columns] = other[:, rows, columns]
        return image, other_label, 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / image[0].numel()


def _rectangle(size: int, share: float) -> tuple[slice, slice]:
    """Return a rectangle of the image's shape with the rest of its area, at a random place, cut at the edges."""
    half = int(size * (1 - share) ** 0.5) // 2
    places = [int(torch.randint(size, ())) for _ in range(2)]
    rows, columns = (slice(max(0, place - half), min(size, place + half)) for place in places)
    return rows, columns


def eval_transform(config: ImagesConfig) -> Transform:
    """Return what is done to an image in evaluation: the shorter side resized, the middle cut out."""
    v2: Any = import_torchvision("torchvision.transforms.v2")
    return v2.Compose([*_middle_by(v2, config), v2.PILToTensor()])  # type: ignore[no-any-return]


def _middle_by(v2: Any, config: ImagesConfig) -> list[Any]:
    return [not_too_long, v2.Resize(config.resize, antialias=True), v2.CenterCrop(config.size)]


def not_too_long(image: Any) -> Any:
    """Return an image of PIL, of one that is far longer than wide the middle."""
    short, long = sorted(image.size)
    if long <= _LONGEST * short:
        return image
    width, height = (min(side, _LONGEST * short) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def train_transform(config: ImagesConfig) -> Transform:
    """Return what is done to a training image, in the order of torchvision's references."""
    v2: Any = import_torchvision("torchvision.transforms.v2")
    size, kind = config.size, config.augmentation
    steps: list[Any] = []
    if kind == "resized-crop":
        steps.append(v2.RandomResizedCrop(size, antialias=True))
    elif kind == "padded-crop":
        steps += [*_middle_by(v2, config), v2.RandomCrop(size, padding=max(1, size // 8))]
    else:
        steps += _middle_by(v2, config)
    if kind != "none" and config.flip > 0:
        steps.append(v2.RandomHorizontalFlip(config.flip))
    policies: dict[str, Callable[[], list[Any]]] = {
        "none": lambda: [],
        "randaugment": lambda: [v2.RandAugment()],
        "trivialaugment": lambda: [v2.TrivialAugmentWide()],
        "augmix": lambda: [v2.AugMix()],
        "imagenet": lambda: [v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET)],
        "cifar10": lambda: [v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)],
    }
    steps += [*policies[config.auto_augment](), v2.PILToTensor()]
    if config.random_erase > 0:  # by the mean colour, which is 0 once it is normalised
        steps.append(v2.RandomErasing(config.random_erase, value=[round(255 * mean) for mean in MEAN]))
    return v2.Compose(steps)  # type: ignore[no-any-return]


class SyntheticImages:
    """A `Dataset` of random images: a few in memory, which come again and again.

    Args:
        count: how many samples there are.
        config: their size and the number of classes.
        seed: of the images.
    """

    reads_ahead = True

    def __init__(self, count: int, config: ImagesConfig, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        pool = (min(_POOL, count), 3, config.size, config.size)
        self._count, self._num_classes = count, config.num_classes
        self._images = torch.randint(256, pool, dtype=torch.uint8, generator=generator)

    def __len__(self) -> int:
        return self._count

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return images, uint8 `(n, 3, size, size)`, and labels, int64 `(n,)`, of the samples `indices`."""
        return self._images[indices % len(self._images)], indices % len(self._images) % self._num_classes

    def num_targets(self, indices: Tensor) -> int:
        """Return one a sample."""
        return len(indices)


def normalised(images: Tensor, dtype: torch.dtype, is_channels_last: bool) -> Tensor:
    """Return bytes, uint8 `(n, 3, height, width)`, as what models are trained on: mean 0 and standard deviation 1."""
    layout = torch.channels_last if is_channels_last else torch.contiguous_format
    # Made there of plain numbers, they would be waited for on a GPU, as by a copy.
    known = (torch.tensor(v, dtype=dtype, device="cpu").view(1, 3, 1, 1) for v in (MEAN, STD))
    mean, std = (v.to(images.device, non_blocking=True) for v in known)
    return images.contiguous(memory_format=layout).to(dtype).sub_(255 * mean).div_(255 * std)
