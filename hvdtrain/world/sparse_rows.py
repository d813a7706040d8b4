"""Gradients that name their rows: every rank is sent those of all."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from hvdtrain.world.world import World


class SparseRows:
    """A parameter whose gradient names its non-zero rows: every rank is sent all ranks' rows, in their own type.

    Args:
        name: of the collectives.
        parameter: the weight of an embedding.
        world: the ranks.
    """

    def __init__(self, name: str, parameter: nn.Parameter, world: World) -> None:
        self.name = name
        self.parameter = parameter
        self._world = world
        self._waits: list[Callable[[], Tensor]] = []
        self._is_dense = False
        """The gradient that was sent names no rows: of a weight that is tied to a layer's, say."""

    @property
    def is_sent(self) -> bool:
        """Return whether it is on the wire."""
        return bool(self._waits)

    def send(self) -> None:
        """Send the non-zero rows, none where there is no gradient."""
        gradient = None if self.parameter.grad is None else self.parameter.grad.detach()
        if gradient is None:
            rows = torch.zeros(0, dtype=torch.int64, device=self.parameter.device)
            values = torch.zeros(0, *self.parameter.shape[1:], dtype=self.parameter.dtype, device=rows.device)
        else:
            self._is_dense = not gradient.is_sparse
            gradient = gradient.coalesce() if gradient.is_sparse else gradient.to_sparse(1)
            rows, values = gradient.indices()[0].contiguous(), gradient.values()
        wire = values.float() if values.dtype == torch.bfloat16 else values
        self._waits = [
            self._world.start_all_gather(rows, f"{self.name}.rows"),
            self._world.start_all_gather(wire.contiguous() / self._world.size, f"{self.name}.values"),
        ]

    def receive(self) -> None:
        """Make the mean the parameter's `.grad`, None where no rank has a row."""
        rows, values = (wait() for wait in self._waits)
        self._waits = []
        if len(rows) == 0:
            self.parameter.grad = None
            return
        gradient = torch.sparse_coo_tensor(
            rows[None], values.to(self.parameter.dtype), self.parameter.shape, check_invariants=False
        )
        self.parameter.grad = gradient.to_dense() if self._is_dense else gradient.coalesce()


def sparse_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Return the weights of embeddings that were built with `sparse=True`."""
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag)]
    return {cast(nn.Parameter, module.weight) for module in embeddings if module.sparse}
