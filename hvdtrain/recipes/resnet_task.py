"""What the recipe resnet trains: the model, its images, its loss, and what is read at the end."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvdtrain.data.image_files import Images, find_images
from hvdtrain.data.image_samples import MEAN, STD, UNREAD, ImageSamples, SyntheticImages, normalised
from hvdtrain.recipes.confusion import ConfusionMatrix
from hvdtrain.recipes.image_models import Description, build_classifier
from hvdtrain.recipes.pictures import shown_images
from hvdtrain.recipes.resnet import ImageClassifier
from hvdtrain.trainer.task import Batch, Task

_TOP = 5


def build_task(recipe: ImageClassifier) -> Task:
    """Find the images, and build the model for their classes.

    Raises:
        UsageError: there are no images, or the model does not fit them.
    """
    config, settings = recipe.data, recipe.model
    images = None if config.synthetic else find_images(config)
    classes = images.train.classes if images else tuple(map(str, range(config.num_classes)))
    zero_gamma = settings.zero_init_gamma and settings.has_residual_gains
    model = build_classifier(settings.name, len(classes), config.size, seed=recipe.train.seed, zero_gamma=zero_gamma)
    if is_channels_last(recipe):
        model = cast(Any, model).to(memory_format=torch.channels_last)  # which not every torch's types know
    train, held_out = _samples(recipe, images)
    confusion = ConfusionMatrix(classes)
    loss = ClassificationLoss(recipe, len(classes), confusion)
    about = Description(
        name=settings.name, classes=classes, image_size=config.size, resize=config.resize, mean=MEAN, std=STD
    )
    return Task(
        model=model,
        train_data=train,
        val_data=held_out,
        loss_sums=loss,
        metrics=loss.metrics,
        unit="images",
        summarize=loss.summarize,
        samples=lambda model, metrics: shown_images(model, held_out, classes, lambda batch: batch[0], loss.logits),
        epilogue=lambda model, metrics: confusion.describe(),
        write_model_files=lambda folder: _write(folder, about),
        description=_describe(recipe, images, len(train), len(held_out), len(classes)),
        components=(confusion.of,),
    )


def is_channels_last(recipe: ImageClassifier) -> bool:
    """Return what `--model.channels-last` comes to on this machine."""
    chosen = recipe.model.channels_last
    return torch.cuda.is_available() if chosen == "auto" else chosen == "yes"


def _samples(recipe: ImageClassifier, images: Images | None) -> tuple[Any, Any]:
    config, seed = recipe.data, recipe.train.seed
    if images is None:
        count = config.synthetic_images
        return SyntheticImages(count, config, seed), SyntheticImages(max(1, count // 10), config, seed + 1)
    return (
        ImageSamples(images.train, config, is_training=True),
        ImageSamples(images.held_out, config, is_training=False),
    )


class ClassificationLoss:
    """Sums of a batch's cross entropy and right answers. Labels are smoothed in training only.

    Args:
        recipe: the settings.
        num_classes: how many there are.
        confusion: is told each answer.
    """

    def __init__(self, recipe: ImageClassifier, num_classes: int, confusion: ConfusionMatrix) -> None:
        self._smoothing = recipe.labels.smoothing
        self._is_channels_last = is_channels_last(recipe)
        self._top = min(_TOP, num_classes)
        self._confusion = confusion
        top = (f"top{_TOP}",) if num_classes > _TOP else ()
        skips = recipe.data.on_error == "skip" and not recipe.data.synthetic
        self.metrics = ("loss", "top1", *top, *(("unread",) if skips else ()))

    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return the sums of a batch as `ImageSamples.batch` makes it."""
        _, labels, *mixture = batch
        logits = self.logits(model, batch)
        smoothing = self._smoothing if model.training else 0.0
        if mixture:
            others, shares = mixture
            shares = shares.to(logits.dtype)
            losses = shares * _entropy(logits, labels, smoothing) + (1 - shares) * _entropy(logits, others, smoothing)
        else:
            losses = _entropy(logits, labels, smoothing)
        answers = logits.detach().topk(self._top, dim=1).indices
        is_right = answers == labels.unsqueeze(1)
        self._confusion.add(labels, answers[:, 0])
        sums = {"loss": losses.sum(), "top1": is_right[:, 0].sum(), f"top{_TOP}": is_right.sum()}
        sums["unread"] = (labels == UNREAD).sum()
        return {name: sums[name] for name in self.metrics}

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the model's answer to a batch, `(n, classes)`."""
        logits: Tensor = model(normalised(batch[0], next(model.parameters()).dtype, self._is_channels_last))
        return logits

    def summarize(self, means: dict[str, float]) -> dict[str, float]:
        """Return means over the images that could be read."""
        unread = means.get("unread", 0.0)
        read = 1 - unread
        own = {name: value / read if read else math.nan for name, value in means.items() if name != "unread"}
        return {**own, **({"unread": unread} if "unread" in means else {})}


def _entropy(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Return cross entropies, `(n,)`; those of images that could not be read are 0."""
    return F.cross_entropy(logits, labels, ignore_index=UNREAD, label_smoothing=smoothing, reduction="none")


def _describe(recipe: ImageClassifier, images: Images | None, num_train: int, num_val: int, num_classes: int) -> str:
    config = recipe.data
    what = "random images" if images is None else f"{config.root}"
    count = f"{num_train:,} training images, {num_val:,} held out, {num_classes:,} classes, {config.size}x{config.size}"
    return f"data:       {what}: {count}{images.about if images else ''}\nmodel:      {recipe.model.name}"


def _write(folder: Path, about: Description) -> None:
    (folder / "config.json").write_text(json.dumps(about.as_dict(), indent=2) + "\n")
