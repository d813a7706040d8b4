"""Image classifiers: any of torchvision's, by large batches as in arXiv:1706.02677.

    horovodrun -np 8 python -m hvdtrain train resnet --data.root imagenet --data.workers 8

`--model.name vit_b_16` trains another one; `--data.synthetic` needs no images, to measure speed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from hvdtrain.data.images_config import ImagesConfig
from hvdtrain.optim.sgd import SgdConfig
from hvdtrain.settings import LogConfig, ModelConfig, Section, TrainConfig, setting
from hvdtrain.trainer.task import Recipe, Task

if TYPE_CHECKING:
    from typing_extensions import Self

_RESIDUAL = ("resnet", "resnext", "wide_resnet")


@dataclass(frozen=True, kw_only=True)
class ImageModelConfig(ModelConfig):
    """The image classifier."""

    name: str = "resnet50"
    """A classification model of torchvision, such as resnet50, convnext_tiny or vit_b_16; or, for images of about
    32x32, resnet20, 32, 44, 56 or 110 of arXiv:1512.03385, section 4.2."""
    zero_init_gamma: bool = True
    """ResNets: the last gain of each residual block begins with zero (arXiv:1706.02677, section 5.1)."""
    channels_last: Literal["auto", "yes", "no"] = "auto"
    """Keep the channels of a pixel beside each other in memory. auto: on GPUs, whose convolutions are faster then; on
    CPUs it gains nothing, and costs where images are small."""

    @property
    def has_residual_gains(self) -> bool:
        """Return whether it is a ResNet, whose blocks end in a normalisation."""
        return self.name.startswith(_RESIDUAL)

    def unused(self) -> Iterator[tuple[str, str]]:
        """Yield what only ResNets have."""
        yield from super().unused()
        if not self.has_residual_gains:
            yield "zero_init_gamma", f"it is for ResNets, and the model is {self.name}"


@dataclass(frozen=True, kw_only=True)
class LabelsConfig(Section):
    """What the model is asked to say."""

    smoothing: float = setting(0.1, minimum=0, below=1)
    """In training, this share of each label is spread over all classes (arXiv:1512.00567, section 7)."""


@dataclass(frozen=True, kw_only=True)
class ImageClassifier(Recipe):
    """An image classifier of torchvision on images in folders, CIFAR-10 or random ones."""

    model: ImageModelConfig = field(default_factory=ImageModelConfig)
    data: ImagesConfig = field(default_factory=ImagesConfig)
    labels: LabelsConfig = field(default_factory=LabelsConfig)

    def resolve(self) -> Self:
        """Return the settings without workers where there is nothing to decode."""
        if not self.data.synthetic:
            return self
        return dataclasses.replace(self, data=dataclasses.replace(self.data, workers=0))

    def build(self, say: Callable[[str], None]) -> Task:
        """Find the images and build the model."""
        from hvdtrain.recipes.resnet_task import build_task

        return build_task(self)


def resnet() -> ImageClassifier:
    """Return arXiv:1706.02677's settings for ResNet-50: 90 epochs, 0.1 for a batch of 256, five epochs of warm-up."""
    return ImageClassifier(
        train=TrainConfig(epochs=90, global_batch_size=256, max_grad_norm=None),
        optim=SgdConfig(
            peak_lr=0.1,
            lr_rule="linear",
            reference_batch=256,
            momentum=0.9,
            nesterov=True,
            weight_decay=1e-4,
            schedule="multistep",
            warmup_fraction=5 / 90,
        ),
        data=ImagesConfig(workers=2),
        log=LogConfig(every=100),
    )
