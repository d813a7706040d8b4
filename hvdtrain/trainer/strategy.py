"""How far the ranks agree: are they equal now, what must be equal, and what makes them so.

Who checks replicas, saves, evaluates or averages buffers asks the strategy of the job, so that training whose ranks
drift apart between averages (local SGD, arXiv:1805.09767), or that spreads the optimizer's state over them (ZeRO,
arXiv:1910.02054), is one more class here.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hvdtrain.models.private_torch import norm_of
from hvdtrain.models.walk import owned_by
from hvdtrain.models.weights import model_weights
from hvdtrain.trainer.component import nested_tensors
from hvdtrain.trainer.shared_copies import shared_out
from hvdtrain.world import World, WrappedOptimizer, per_rank_buffers

if TYPE_CHECKING:
    from hvdtrain.trainer.component import Component
    from hvdtrain.trainer.job import Job
    from hvdtrain.trainer.state import Training


class Strategy(ABC):
    """What is shared between ranks, and when. Every method is called by every rank."""

    agrees: bool = True
    """Whether a step counts on all ranks or on none."""
    shares_state: bool = True
    """Whether every rank's optimizer begins with the state of rank 0's."""
    gathers_state: bool = False
    """Whether `optimizer_state` is a copy in host memory already."""
    divides_state: bool = False
    """Whether each rank has a part of the optimizer's state, and no rank all of it."""
    is_made_equal: bool = False
    """Whether ranks that train apart have been made equal for a while (`made_equal`)."""
    rests_between_updates: bool = False
    """Whether nothing but an update changes weights and the optimizer's state, whatever is saved or evaluated."""

    def components(self, job: Job) -> list[Component]:
        """Return the components, with states of their own, that the strategy needs."""
        return []

    @abstractmethod
    def wrap(
        self, world: World, optimizer: torch.optim.Optimizer, model: nn.Module, **options: Any
    ) -> WrappedOptimizer:
        """Return the optimizer, with gradients averaged as the strategy has it. Collective.

        Raises:
            ConfigError: as `World.wrap`.
        """

    @abstractmethod
    def is_equal_after(self, step: int) -> bool:
        """Tell whether all ranks hold the same weights and buffers when `step` optimizer steps are completed."""

    @abstractmethod
    def agree(self, world: World, is_finite: Tensor) -> Tensor:
        """Return whether a step counts, bool, a scalar, from this rank's gradient; alike on all if it `agrees`."""

    @abstractmethod
    def after_update(self, world: World, training: Training) -> None:
        """Do what the strategy does after an update, such as to average weights. Collective."""

    def busy_until(self, training: Training) -> int:
        """Return the step after which all that is on the wire now will have been taken; alike on all ranks."""
        return 0

    @abstractmethod
    def made_equal(self, world: World, training: Training) -> AbstractContextManager[None]:
        """Return a context in which every rank's model holds the weights to save and to evaluate. Collective."""

    @abstractmethod
    def replicated_tensors(self, training: Training, with_optimizer: bool) -> dict[str, Tensor]:
        """Return the tensors of the model, and perhaps of the optimizer, that must be equal on all ranks now."""

    def end(self, world: World, training: Training) -> None:  # noqa: B027  most have nothing to do
        """Leave the weights that were evaluated last, alike on all ranks, in the model, for good. Collective."""

    @abstractmethod
    def optimizer_state(self, world: World, training: Training) -> dict[str, Any]:
        """Return the whole state of the optimizer on rank 0, as its `state_dict` has it. Collective."""

    def shares_copies(self, world: World) -> bool:
        """Return whether each rank copies and writes a part of what all have, though one rank could write all."""
        return False

    def divided_optimizer_state(self, world: World, training: Training) -> tuple[dict[str, Any], dict[int, Any]]:
        """Return what rank 0 writes of the optimizer where each rank writes a part, and this rank's part."""
        return training.optimizer.state_dict(), {}

    def part_of_state(
        self, world: World, training: Training, state: Mapping[str, Any] | None
    ) -> Mapping[str, Any] | None:
        """Return what this rank's optimizer loads of the whole state that rank 0 has, others None. Collective.

        None: nothing. Where the state is shared, rank 0 loads it, and it is sent once, to where it lies.
        """
        return state

    def moved(self, training: Training) -> list[nn.Parameter]:
        """Return what this rank's optimizer moves and has a gradient for, in an order that is its own.

        What it leaves alone is not averaged, and differs on every rank.
        """
        return [parameter for parameter in owned_by(training.optimizer) if parameter.grad is not None]

    def norm_of(self, world: World, gradients: Sequence[Tensor]) -> Tensor:
        """Return the Euclidean norm, a scalar, of the gradient of which this rank has these parts. Collective.

        Of none it is 0, on the device: what else is known of a step is there, and would meet a number of the host.
        """
        return norm_of(gradients) if gradients else torch.zeros((), device=world.device)

    def norms_of(self, world: World, layers: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Return the norm, a scalar, of each layer's gradient, of which this rank has these parts. Collective."""
        return [nn.utils.get_total_norm(parts) for parts in layers]

    def named_gradients(self, training: Training) -> list[tuple[str, Tensor | None]]:
        """Return the name of every parameter that learns, alike on all ranks, and what this rank has of its gradient.

        A parameter without a gradient on any rank may be left out.
        """
        own = set(owned_by(training.optimizer))
        named = training.model.named_parameters()
        return [(name, item.grad) for name, item in named if item.grad is not None and item in own]

    def whole_gradients(self, training: Training) -> dict[nn.Parameter, Tensor]:
        """Return the averaged gradients of what the optimizer moves, whole; zeros where there is none. Collective."""
        own = owned_by(training.optimizer)
        return {item: torch.zeros_like(item) if item.grad is None else item.grad.to_dense() for item in own}


class EveryStep(Strategy):
    """Gradients are averaged in every step: all ranks are equal after each, in everything."""

    rests_between_updates = True

    def wrap(
        self, world: World, optimizer: torch.optim.Optimizer, model: nn.Module, **options: Any
    ) -> WrappedOptimizer:
        """Average over the world."""
        return world.wrap(optimizer, model, **options)

    def is_equal_after(self, step: int) -> bool:
        """Return True."""
        return True

    def agree(self, world: World, is_finite: Tensor) -> Tensor:
        """Return this rank's answer: every rank has looked at the same averaged gradient."""
        return is_finite

    def after_update(self, world: World, training: Training) -> None:
        """Do nothing."""

    def made_equal(self, world: World, training: Training) -> AbstractContextManager[None]:
        """Change nothing."""
        return contextlib.nullcontext()

    def replicated_tensors(self, training: Training, with_optimizer: bool) -> dict[str, Tensor]:
        """Return all of both."""
        tensors = model_tensors(training.model)
        return {**tensors, **optimizer_tensors(training)} if with_optimizer else tensors

    def optimizer_state(self, world: World, training: Training) -> dict[str, Any]:
        """Return the optimizer's own."""
        return training.optimizer.state_dict()

    def shares_copies(self, world: World) -> bool:
        """Return True for GPUs, whose memory must be copied: side by side by all ranks of a host."""
        return world.device.type == "cuda"

    def divided_optimizer_state(self, world: World, training: Training) -> tuple[dict[str, Any], dict[int, Any]]:
        """Return the outline and this rank's share, where copies are shared; else rank 0 writes all."""
        state = training.optimizer.state_dict()
        if not self.shares_copies(world):
            return state, {}
        weights_bytes = sum(tensor.nbytes for tensor in model_weights(training.model).values())
        return shared_out(state, world.rank, world.size, weights_bytes)


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name, without those that are each rank's own."""
    own = per_rank_buffers(model)
    buffers = {name: buffer for name, buffer in model.named_buffers() if name not in own}
    return {**dict(model.named_parameters()), **buffers}


def optimizer_tensors(training: Training) -> dict[str, Tensor]:
    """Return the tensors of the optimizer's state by what they are, those in lists and tuples of it, too."""
    names: dict[Any, str] = {parameter: name for name, parameter in training.model.named_parameters()}
    state: Mapping[Any, Any] = training.optimizer.state
    return {
        f"optimizer's {key} of {names.get(owner, '?')}" if isinstance(owner, Tensor) else f"optimizer's {key}": value
        for owner, entries in state.items()
        for key, value in nested_tensors(entries, "" if isinstance(owner, Tensor) else str(owner)).items()
    }
