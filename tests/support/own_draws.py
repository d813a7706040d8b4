"""Data sets whose samples draw from generators of their own, in a file that worker processes import."""

import functools
import random

import numpy as np
import torch

OF_THE_FILE = np.random.default_rng(3)
OTHER_OF_THE_FILE = np.random.default_rng(4)


class Compose:
    """Transforms one after another, each with a generator of its own, as those of albumentations."""

    def __init__(self):
        self.steps = [Noise(), Noise()]

    def __call__(self):
        return sum(step() for step in self.steps)


class Noise:
    __slots__ = ("rng",)

    def __init__(self):
        self.rng = np.random.default_rng()

    def __call__(self):
        return self.rng.random()


def drawn(rng):
    return rng.random()


class Drawing:
    """Sample i is what it draws."""

    of_the_class = random.Random(1)

    def __init__(self, kind):
        self.kind = kind
        self.numpy = np.random.default_rng() if kind == "numpy" else None
        self.older = np.random.RandomState() if kind == "older numpy" else None
        self.python = random.Random() if kind == "python" else None
        self.torch = torch.Generator() if kind == "torch" else None
        self.transform = {"composed": Compose, "partial": self.partial}.get(kind, lambda: None)()

    @staticmethod
    def partial():
        return functools.partial(drawn, rng=np.random.Generator(np.random.MT19937()))

    def __len__(self):
        return 12

    def __getitem__(self, i):
        draw = {
            "numpy": lambda: self.numpy.random(),
            "older numpy": lambda: self.older.rand(),
            "python": lambda: self.python.random(),
            "torch": lambda: torch.rand((), generator=self.torch).item(),
            "composed": lambda: self.transform(),
            "partial": lambda: self.transform(),
            "of the class": lambda: self.of_the_class.random(),
            "of the file": lambda: drawn(OF_THE_FILE),
            "by a function of the file": by_a_function,
            "a transform of the file": lambda: TRANSFORM(),
        }[self.kind]
        return torch.tensor(draw(), dtype=torch.float64)


def by_a_function():
    return OTHER_OF_THE_FILE.random()


TRANSFORM = Compose()
KINDS = (
    *("numpy", "older numpy", "python", "torch", "composed", "partial"),
    *("of the class", "of the file", "by a function of the file", "a transform of the file"),
)


class Whole(Drawing):
    """hvdtrain's own kind of data set, which is not told of draws."""

    def batch(self, indices):
        return (torch.stack([self[int(i)] for i in indices]),)

    def num_targets(self, indices):
        return len(indices)


class Running(Drawing):
    """A stream of the same."""

    def __iter__(self):
        return map(super().__getitem__, range(len(self)))
