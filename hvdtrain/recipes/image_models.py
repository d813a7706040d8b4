"""Image classifiers by name, and what a run writes of them so that others can build them again."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hvdtrain.data.torchvision_import import import_torchvision
from hvdtrain.errors import ConfigError, DataError, one_line
from hvdtrain.models.mlp import Mlp
from hvdtrain.models.small_resnet import DEPTHS, SmallResNet
from hvdtrain.settings import nearest
from hvdtrain.settings.untrusted import read_json

_LARGEST = 1 << 14

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

    def normalise(self, images: Tensor) -> Tensor:
        """Return bytes, uint8 `(n, channels, height, width)`, as what the model is shown, fp32."""
        mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (self.mean, self.std))
        return (images.float() / 255 - mean) / std

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return dataclasses.asdict(self)


def read_description(folder: Path) -> Description:
    """Read the `config.json` in `folder`.

    Raises:
        DataError: there is none, or it is not that of an image classifier.
    """
    values = read_json(folder / "config.json")
    if values.get("model_type") != MODEL_TYPE:
        raise DataError(f"{folder} holds a model of type {values.get('model_type')!r}, not a classifier of images")
    kept: dict[str, Any] = {item.name: values.get(item.name, item.default) for item in dataclasses.fields(Description)}
    sizes = (kept["image_size"], kept["resize"], kept["channels"])
    is_sane = (
        isinstance(kept["name"], str)
        and all(type(size) is int and 0 < size <= _LARGEST for size in sizes)
        and isinstance(kept["classes"], list)
        and all(isinstance(name, str) for name in kept["classes"])
        and all(isinstance(kept[part], list) and len(kept[part]) == kept["channels"] for part in ("mean", "std"))
        and all(type(value) is float and 0 <= value <= 1 for value in (*kept["mean"], *kept["std"]))
    )
    if not is_sane or not kept["classes"]:
        raise DataError(f"{folder / 'config.json'} is no description of a classifier that hvdtrain has written")
    kept.update({name: tuple(value) for name, value in kept.items() if isinstance(value, list)})
    return Description(**kept)


def load_classifier(about: Description, weights: Mapping[str, Tensor], source: str) -> nn.Module:
    """Return the classifier with trained weights, in evaluation mode, on the CPU.

    Raises:
        DataError: the weights do not fit their description.
    """
    try:
        if about.channels == 1:
            model: nn.Module = Mlp()
        else:
            model = build_classifier(about.name, len(about.classes), about.image_size, seed=0)
        model.load_state_dict(weights)
    except (ConfigError, RuntimeError) as error:
        raise DataError(f"the weights of {source} do not fit its config.json: {one_line(error)}") from error
    kinds = [weight.dtype for weight in weights.values() if weight.is_floating_point()]
    return model.to(kinds[0]).eval() if kinds else model.eval()


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
        raise ConfigError(
            f"--model.name {name} cannot see images of {image_size}x{image_size} ({one_line(error)}): choose another"
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
        raise ConfigError(
            f"--model.name {name} cannot be built for images of {image_size}x{image_size} ({one_line(error)}): choose"
            " another --data.image-size"
        ) from error
    return model
