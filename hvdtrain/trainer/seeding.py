"""All generators of random numbers that a micro-batch may draw from, seeded together."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hvdtrain.data.draws import seed_numpy_and_python
from hvdtrain.data.own_generators import Generator, seed_all, states_of
from hvdtrain.models.private_torch import is_freshly_seeded


class Generators:
    """Those of torch, numpy and Python, and those that a model or its loss keeps for itself.

    Left alone, the last would draw the same on all ranks, and other numbers after a resume.

    Args:
        device: of the model.
        own: generators of the user's.
    """

    def __init__(self, device: torch.device, own: Sequence[Generator] = ()) -> None:
        self._of_torch = {"torch": torch.default_generator}
        if device.type == "cuda":
            self._of_torch["torch on the GPU"] = torch.cuda.default_generators[device.index or 0]
        # Whoever keeps one of those that all share means these.
        shared = (*self._of_torch.values(), _global_of(random.seed), _global_of(np.random.seed))
        self.own = tuple(generator for generator in own if all(generator is not other for other in shared))
        """Generators of the user's."""

    def seed(self, seed: int) -> None:
        """Seed them all (`torch.manual_seed` takes 0.2 ms)."""
        if self.own:
            seed_all(self.own, seed)
        for generator in self._of_torch.values():
            generator.manual_seed(seed)
        seed_numpy_and_python(seed)

    def is_untouched(self, seed: int) -> bool:
        """Return whether nothing has drawn from torch's since they were given this seed."""
        return all(is_freshly_seeded(generator, seed) for generator in self._of_torch.values())

    def drawn_from(self, seed: int, num_marks: int) -> set[str]:
        """Return by name those that were drawn from since then: of torch's on the CPU, more than so many marks."""
        found: set[str] = set()
        expected = torch.Generator().manual_seed(seed)
        for _ in range(num_marks):
            torch.randint(2**62, (), generator=expected)
        if not torch.default_generator.get_state().equal(expected.get_state()):
            found.add("torch")
        on_gpu = {name: generator for name, generator in self._of_torch.items() if name != "torch"}
        found |= {name for name, generator in on_gpu.items() if not is_freshly_seeded(generator, seed)}
        if random.getstate() != random.Random(seed).getstate():
            found.add("Python")
        fresh = np.random.RandomState(seed % 2**32).get_state(legacy=False)
        now = np.random.get_state(legacy=False)
        if str(now) != str(fresh) or (now["state"]["key"] != fresh["state"]["key"]).any():
            found.add("numpy")
        if self.own:
            drawn = states_of(self.own)
            seed_all(self.own, seed)
            if drawn != states_of(self.own):
                found.add("a generator of your own")
        return found


def _global_of(seed: Any) -> Any:
    """Return the generator that a module's function seeds."""
    return getattr(seed, "__self__", None)
