"""The textbook network for handwritten digits: fully connected layers with ReLU, and log-probabilities at the end."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Mlp(nn.Module):
    """Linear layers of the given sizes with ReLU between them and LogSoftmax after the last.

    Weights are torch's defaults, drawn from `seed`; the global random number generator is left as it was.
    """

    def __init__(self, sizes: Sequence[int] = (784, 128, 64, 10), *, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed: it would also seed the GPUs, which are not restored here.
            torch.default_generator.manual_seed(seed)
            layers: list[nn.Module] = []
            for inputs, outputs in itertools.pairwise(sizes):
                layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1], nn.LogSoftmax(dim=1))

    def forward(self, x: Tensor) -> Tensor:
        """Map images `(n, 1, 28, 28)` or rows `(n, 784)` (sizes[0] values each) to log-probabilities `(n, 10)`."""
        log_probabilities: Tensor = self.layers(x.flatten(1))
        return log_probabilities
