"""The verb `predict`: what images show, by a trained classifier; what is said in clips (`transcribe.py`)."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hvdtrain.data.image_decoding import in_rgb, open_image
from hvdtrain.data.image_samples import eval_transform
from hvdtrain.data.images_config import ImagesConfig
from hvdtrain.errors import ConfigError, DataError, one_line
from hvdtrain.recipes.image_models import MODEL_TYPE, Description, load_classifier, read_description
from hvdtrain.rundir.trained import open_trained
from hvdtrain.verbs.kit import check_json_path, write_json
from hvdtrain.verbs.loading import CTC, auto_class_of
from hvdtrain.verbs.options import PredictOptions
from hvdtrain.verbs.transcribe import transcribe

_BATCH = 32
# MNIST's digits fill a box of 20x20 pixels, whose middle of mass is the middle of the image.
_BOX, _DIM, _INK = 20, 127, 64


def predict(options: PredictOptions) -> int:
    """Answer `predict RUN_DIR FILES...`; returns the exit code.

    Raises:
        ConfigError: there are no files.
        DataError: the model is none of images, or a file cannot be read.
    """
    if not options.files:
        raise ConfigError("predict is given images or clips of speech: python -m hvdtrain predict RUN_DIR FILES...")
    check_json_path(options.json)
    trained = open_trained(options.run_dir, options.checkpoint)
    if auto_class_of(trained) == CTC:
        return transcribe(options, trained)
    if trained.model_type != MODEL_TYPE:
        raise DataError(
            f"{trained.source} neither classifies images nor hears speech: predict is for runs of resnet, mnist and ctc"
        )
    about = read_description(trained.folder)
    model = load_classifier(about, trained.weights, trained.source)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = next(model.parameters()).dtype
    model.to(device)
    top = min(options.top, len(about.classes))
    width = max(len(str(file)) for file in options.files)
    answers: list[dict[str, Any]] = []
    for start in range(0, len(options.files), _BATCH):
        files = options.files[start : start + _BATCH]
        images = about.normalise(torch.stack([read_image(file, about) for file in files]))
        with torch.no_grad():
            likely = model(images.to(device, dtype)).double().softmax(1).cpu().topk(top)
        for file, shares, places in zip(files, likely.values.tolist(), likely.indices.tolist(), strict=True):
            found = [*_named(about.classes, places, shares)]
            answers.append({"file": str(file), "classes": [{"class": c, "probability": p} for c, p in found]})
            sys.stdout.write(f"{file!s:{width}}   {'   '.join(f'{name} {share:.1%}' for name, share in found)}\n")
    write_json(options.json, {"model": about.name, "source": trained.source, "images": answers})
    return 0


def _named(classes: Sequence[str], places: list[int], shares: list[float]) -> Iterator[tuple[str, float]]:
    return ((classes[place], share) for place, share in zip(places, shares, strict=True))


def read_image(file: Path, about: Description) -> Tensor:
    """Return an image as bytes, uint8 `(channels, size, size)`, in the way of the classifier's held-out images.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with file.open("rb") as opened:
            image = open_image(opened)
        if about.channels == 1:
            return _grey(_on_white(image), about)
        image = in_rgb(image)
    except Exception as error:  # decoders fail in many ways
        raise DataError(f"the image {file} cannot be read ({one_line(error)})") from error
    return eval_transform(ImagesConfig(image_size=about.image_size, val_resize=about.resize))(image)


def _on_white(image: Any) -> Any:
    """Return an image in grey; what is transparent is white."""
    from PIL import Image

    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L")


def _grey(image: Any, about: Description) -> Tensor:
    """Return a grey image, uint8 `(1, size, size)`, bright on dark, as those of MNIST are.

    One of another size is brought into MNIST's form: digits cut out and placed by their middle of mass, other things
    made square.
    """
    from PIL import Image, ImageOps

    size = about.image_size
    pixels = np.asarray(image)
    if np.concatenate((pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1])).mean() > _DIM:
        image = ImageOps.invert(image)
    if image.size != (size, size) and about.name == "mnist":
        image = _centred(image, size)
    elif image.size != (size, size):
        image = ImageOps.pad(image, (size, size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).unsqueeze(0)


def _centred(image: Any, size: int) -> Any:
    from PIL import Image, ImageOps

    box = image.point(lambda value: 255 * (value > _INK)).getbbox()
    if box is None:
        return Image.new("L", (size, size))
    digit = ImageOps.contain(image.crop(box), (_BOX, _BOX), Image.Resampling.BILINEAR)
    mass = np.asarray(digit, dtype=np.float64)
    middle = [float((mass.sum(1 - axis) * np.arange(mass.shape[axis])).sum() / mass.sum()) for axis in (0, 1)]
    whole = Image.new("L", (size, size))
    down, right = (round((size - 1) / 2 - place) for place in middle)
    whole.paste(digit, (right, down))
    return whole
