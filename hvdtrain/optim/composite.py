"""Several optimizers as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from hvdtrain.optim.closures import loss_of


class Composite(torch.optim.Optimizer):
    """Several optimizers over different parameters that step, save and load as one.

    Args:
        groups: the parts' own parameter groups, in their order.
        parts: the optimizers; Horovod builds the class anew without them, and puts them back.
    """

    def __init__(self, groups: list[dict[str, Any]], parts: Sequence[torch.optim.Optimizer] = ()) -> None:
        super().__init__(groups, {})
        self._parts = list(parts)
        self._num_groups = [len(part.param_groups) for part in parts]

    @property
    def parts(self) -> Sequence[torch.optim.Optimizer]:
        """Return the optimizers."""
        return self._parts

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Take a step with each, on this optimizer's groups and state: loading replaces them."""
        loss = loss_of(closure)
        start = 0
        for part, count in zip(self._parts, self._num_groups, strict=True):
            part.param_groups = self.param_groups[start : start + count]
            part.state = self.state
            part.step()
            start += count
        return loss
