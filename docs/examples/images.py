"""A recipe for images with augmentation: scikit-learn's digits, shifted at random.

horovodrun -np 2 python -m hvdtrain train docs/examples/images.py
The draws of a sample are a function of seed, epoch and sample: the same on any number of ranks and workers.
"""

from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits

import hvdtrain


class Digits:
    """Images of 8 x 8; a training image is shifted by up to one pixel each way, another way in each epoch."""

    def __init__(self, part, is_training):
        digits = load_digits()
        self.images = torch.tensor(digits.images, dtype=torch.float32)[part, None] / 16
        self.labels = torch.tensor(digits.target)[part]
        self.is_training = is_training

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        image = self.images[index]
        if self.is_training:
            dx, dy = torch.randint(-1, 2, (2,)).tolist()
            image = torch.roll(image, (dy, dx), (1, 2))
        return image, self.labels[index]


def loss_sums(model, batch):
    images, labels = batch
    logits = model(images)
    return {
        "loss": torch.nn.functional.cross_entropy(logits, labels, reduction="sum"),
        "accuracy": (logits.argmax(1) == labels).sum(),
    }


@dataclass(frozen=True, kw_only=True)
class Images(hvdtrain.Recipe):
    """A small convolutional network on scikit-learn's digits."""

    def build(self, say):
        torch.manual_seed(self.train.seed)
        model = torch.nn.Sequential(
            torch.nn.Conv2d(1, 16, 3, padding=1),
            torch.nn.ReLU(),
            torch.nn.MaxPool2d(2),
            torch.nn.Conv2d(16, 32, 3, padding=1),
            torch.nn.ReLU(),
            torch.nn.Flatten(),
            torch.nn.Linear(32 * 16, 10),
        )
        return hvdtrain.Task(
            model=model,
            train_data=Digits(slice(0, 1500), is_training=True),
            val_data=Digits(slice(1500, None), is_training=False),
            loss_sums=loss_sums,
            metrics=("loss", "accuracy"),
        )


def recipe():
    return Images(train=hvdtrain.TrainConfig(epochs=8, global_batch_size=50), optim=hvdtrain.AdamWConfig(peak_lr=0.005))
