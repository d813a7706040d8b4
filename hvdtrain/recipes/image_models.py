"""Image classifiers by name, and what a run writes of them so that others can build them again."""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hvdtrain.data.torchvision_import import import_torchvision
from hvdtrain.errors import ConfigError
from hvdtrain.models.small_resnet import DEPTHS, SmallResNet
from hvdtrain.settings import nearest

MODEL_TYPE = "image-classifier"
"""What `config.json` says of such a model."""


@dataclass(frozen=True, kw_only=True)
class Description:
    """All that is needed to build a classifier and to show it an image; `config.json` holds it."""

    model_type: str = MODEL_TYPE
    name: str
    """As `--model.name`; mnist for the network of that recipe."""
    classes: tuple[str, ...]
    image_size: int
    resize: int
    """The shorter side is resized to this, before the middle is cut out."""
    channels: int = 3
    """1: images in grey."""
    mean: tuple[float, ...]
    """Of a channel, on a scale from 0 to 1."""
    std: tuple[float, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return dataclasses.asdict(self)


def model_names() -> list[str]:
    """Return the names that `--model.name` takes."""
    models: Any = import_torchvision("torchvision.models")
    return [*DEPTHS, *models.list_models(module=models)]


def build_classifier(name: str, num_classes: int, image_size: int, *, seed: int, zero_gamma: bool = False) -> nn.Module:
    """Return a model with random weights, on the CPU.

    Args:
        name: as `--model.name`.
        num_classes: how many logits it has.
        image_size: height and width of its images, which transformers are built for.
        seed: of the weights.
        zero_gamma: whether the last gain of each residual block is zero; for ResNets.

    Raises:
        ConfigError: there is no such model, or it cannot see images of this size.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _build(name, num_classes, image_size, zero_gamma)
    _check_size(model, name, image_size)
    return model


def _check_size(model: nn.Module, name: str, image_size: int) -> None:
    """Run the model on shapes alone, without computing anything.

    Raises:
        ConfigError: it cannot see images of this size.
    """
    shapes = {key: tensor.to("meta") for key, tensor in model.state_dict().items()}
    model.eval()
    try:
        torch.func.functional_call(model, shapes, (torch.empty(1, 3, image_size, image_size, device="meta"),))
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(
            f"--model.name {name} cannot see images of {image_size}x{image_size} ({reason[0]}): choose another"
            " --data.image-size"
        ) from error
    finally:
        model.train()


def _build(name: str, num_classes: int, image_size: int, zero_gamma: bool) -> nn.Module:
    if name in DEPTHS:
        return SmallResNet(DEPTHS[name], num_classes, zero_gamma)
    models: Any = import_torchvision("torchvision.models")
    known = model_names()
    if name not in known:
        raise ConfigError(f"--model.name: torchvision has no classification model '{name}'{nearest(name, known)}")
    options: dict[str, Any] = {"num_classes": num_classes}
    if zero_gamma:
        options["zero_init_residual"] = True
    if name in ("googlenet", "inception_v3"):  # their further outputs were for training without normalisation
        options |= {"aux_logits": False, "init_weights": True}
    if name.startswith("vit_"):
        options["image_size"] = image_size
    if name.startswith("maxvit_"):
        options["input_size"] = (image_size, image_size)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model: nn.Module = models.get_model(name, weights=None, **options)
    except (ValueError, RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(
            f"--model.name {name} cannot be built for images of {image_size}x{image_size} ({reason[0]}): choose another"
            " --data.image-size"
        ) from error
    return model
