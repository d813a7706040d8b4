"""Real handwritten digits without a download."""

import numpy as np
import torch

SIZE = 16


def write_digits(folder, *, num_train=150, num_test=37):
    """Write scikit-learn's handwritten digits, enlarged to 28x28, in MNIST's files."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] * (255 / 16)
    images = torch.nn.functional.interpolate(images, size=28, mode="bilinear").clamp(0, 255).byte().squeeze(1)
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix, rows in (("train", slice(0, num_train)), ("t10k", slice(num_train, num_train + num_test))):
        pictures, labels = images[rows].numpy(), digits.target[rows].astype(np.uint8)
        head = np.array([0x803, *pictures.shape], ">i4").tobytes()
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(head + pictures.tobytes())
        head = np.array([0x801, len(labels)], ">i4").tobytes()
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(head + labels.tobytes())


def write_digit_folders(folder, *, num_train=1437, num_test=360):
    """Write scikit-learn's handwritten digits, enlarged to 16x16, as PNG files in a folder for each class."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    for number, index in enumerate(order[: num_train + num_test]):
        place = folder / ("train" if number < num_train else "val") / str(digits.target[index])
        place.mkdir(parents=True, exist_ok=True)
        pixels = (digits.images[index] * (255 / 16)).astype(np.uint8)
        Image.fromarray(pixels).resize((SIZE, SIZE), Image.Resampling.BILINEAR).save(place / f"{index:04}.png")
