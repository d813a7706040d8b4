"""The classic: a 784-128-64-10 network on handwritten digits, with SGD, as textbooks have it.

    horovodrun -np 2 python -m hvdtrain train mnist --data.root DIR --data.download

`--data.dataset fashion-mnist` trains on pictures of clothes instead.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hvdtrain.data.config import VisionConfig
from hvdtrain.errors import DataError
from hvdtrain.optim.sgd import SgdConfig
from hvdtrain.settings import LogConfig, TrainConfig
from hvdtrain.trainer.task import Recipe, Task

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from hvdtrain.data.vision import ImageTensors


@dataclass(frozen=True, kw_only=True)
class Digits(Recipe):
    """The textbook network for 28x28 grey images of ten classes."""

    data: VisionConfig = field(default_factory=VisionConfig)

    def build(self, say: Callable[[str], None]) -> Task:
        """Read the images into memory and build the network."""
        from hvdtrain.data.vision import class_names, load_images
        from hvdtrain.models.mlp import Mlp
        from hvdtrain.recipes.pictures import shown_images

        train, test = load_images(self.data, train=True), load_images(self.data, train=False)
        for images in (train, test):
            _check(images, self.data)
        return Task(
            model=Mlp(seed=self.train.seed),
            train_data=train,
            val_data=test,
            loss_sums=_loss,
            metrics=("loss", "accuracy"),
            samples=lambda model, metrics: shown_images(
                model,
                test,
                class_names(self.data.dataset),
                lambda batch: (batch[0].view(-1, 1, 28, 28) * 127.5 + 127.5).round().byte(),
                lambda model, batch: model(batch[0].to(next(model.parameters()).dtype)),
            ),
            description=f"data:       {self.data.dataset}: {len(train):,} training images, {len(test):,} held out",
            fingerprint=f"{train.fingerprint()} {test.fingerprint()}",
            write_model_files=lambda folder: _write(folder, self.data),
        )


def mnist() -> Digits:
    """Return the textbook's settings: SGD 0.01 without momentum, batch 64, five epochs."""
    return Digits(
        train=TrainConfig(epochs=5, global_batch_size=64, max_grad_norm=None),
        optim=SgdConfig(peak_lr=0.01, schedule="constant", weight_decay=0.0),
        log=LogConfig(every=100),
    )


def _check(images: ImageTensors, data: VisionConfig) -> None:
    """Raise DataError where images are others than the network is for, as those of EMNIST in files of MNIST's form."""
    size, largest = tuple(images.images.shape[1:]), int(images.labels.max())
    if size != (28, 28) or largest > 9:
        raise DataError(
            f"the files of {data.dataset} in {data.root} hold images of {size[0]}x{size[1]} and labels up to {largest}:"
            " this recipe is for 28x28 and ten classes; as folders of images, the recipe resnet takes any"
        )


def _write(folder: Path, data: VisionConfig) -> None:
    from hvdtrain.data.vision import class_names
    from hvdtrain.recipes.image_models import Description

    about = Description(
        name=data.dataset,
        classes=class_names(data.dataset),
        image_size=28,
        resize=28,
        channels=1,
        mean=(0.5,),
        std=(0.5,),
    )
    (folder / "config.json").write_text(json.dumps(about.as_dict(), indent=2) + "\n")


def _loss(model: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Return the summed negative log likelihood, and how many images were recognised."""
    import torch.nn.functional as F

    images, labels = batch
    log_probabilities = model(images)
    return {
        "loss": F.nll_loss(log_probabilities, labels, reduction="sum"),
        "accuracy": (log_probabilities.argmax(1) == labels).sum(),
    }
