"""`--optim.shard`: the optimizer's state is spread over the ranks (ZeRO, arXiv:1910.02054); see `world/sharded.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hvdtrain.models.private_torch import norm_of
from hvdtrain.trainer.strategy import EveryStep, model_tensors
from hvdtrain.world import World, WrappedOptimizer

if TYPE_CHECKING:
    from hvdtrain.trainer.state import Training
    from hvdtrain.world.sharded import Sharding


class Sharded(EveryStep):
    """All ranks hold equal weights after each step, and each the optimizer's state of its part of them."""

    shares_state = False
    gathers_state = divides_state = True

    def wrap(
        self, world: World, optimizer: torch.optim.Optimizer, model: nn.Module, **options: Any
    ) -> WrappedOptimizer:
        """Average over the world, each rank its part."""
        return world.wrap(optimizer, model, shard=True, **options)

    def replicated_tensors(self, training: Training, with_optimizer: bool) -> dict[str, Tensor]:
        """Return the model: of the optimizer no two ranks hold the same."""
        return model_tensors(training.model)

    def optimizer_state(self, world: World, training: Training) -> dict[str, Any]:
        """Return the whole state on rank 0, gathered; nothing on others."""
        return _sharding(training).whole_state(training.optimizer)

    def shares_copies(self, world: World) -> bool:
        """Return False: each rank has a part as it is."""
        return False

    def divided_optimizer_state(self, world: World, training: Training) -> tuple[dict[str, Any], dict[int, Any]]:
        """Return the outline, and this rank's pieces."""
        sharding = _sharding(training)
        return sharding.outline(training.optimizer), sharding.own_pieces(training.optimizer)

    def part_of_state(
        self, world: World, training: Training, state: Mapping[str, Any] | None
    ) -> Mapping[str, Any] | None:
        """Return this rank's part; no other rank than 0 ever holds the whole."""
        return _sharding(training).part_of_state(training.optimizer, state)

    def norm_of(self, world: World, gradients: Sequence[Tensor]) -> Tensor:
        """Return the norm over all ranks' pieces: the root of the sum of their squares, in fp64."""
        return self.norms_of(world, [gradients])[0]

    def norms_of(self, world: World, layers: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Return the norm of each layer over all ranks' pieces, in fp64: a rank may have none to tell a type by."""
        if not layers:
            return []
        nothing = torch.zeros((), dtype=torch.float64, device=world.device)  # made there: a copy would be waited for
        squares = torch.stack([norm_of(parts).double().square() if parts else nothing for parts in layers])
        return [*world.all_reduce(squares, "sum", "sharded.norms").sqrt()]

    def named_gradients(self, training: Training) -> list[tuple[str, Tensor | None]]:
        """Return every parameter that learns, and the gradient of this rank's piece of it."""
        own = {piece.part.parameter: piece.moved.grad for piece in _sharding(training).pieces}
        moved = set(_sharding(training).parameters)
        named = training.model.named_parameters()
        return [(name, own.get(item)) for name, item in named if item.requires_grad and item in moved]

    def whole_gradients(self, training: Training) -> dict[nn.Parameter, Tensor]:
        """Return the gradients, gathered."""
        return _sharding(training).gradients()


def _sharding(training: Training) -> Sharding:
    sharding = training.optimizer.sharding
    assert sharding is not None
    return sharding
