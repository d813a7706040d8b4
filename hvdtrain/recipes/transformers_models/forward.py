"""The forward pass of a model of transformers, and the loss of packed documents by it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from hvdtrain.models.loss import is_by_chunks, next_token_loss, positions_at_once
from hvdtrain.recipes.transformers_models.balance import Balance
from hvdtrain.recipes.transformers_models.layouts import Batch, Call, Layout


def run(model: nn.Module, inputs: dict[str, Any]) -> Any:
    """Return the output of a forward pass, without a cache of keys and values."""
    return model(**arguments(model, inputs))


def arguments(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a forward pass that keeps no keys and values."""
    parameters = inspect.signature(model.forward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return {**inputs, **({"use_cache": False} if takes_any or "use_cache" in parameters else {})}


def draws(device: torch.device, work: Callable[[], Any]) -> bool:
    """Return whether `work` draws random numbers, on the host or this device; the generators are put back."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        generators = [torch.default_generator]
        if device.type == "cuda":
            generators.append(torch.cuda.default_generators[device.index or 0])
        before = [generator.get_state() for generator in generators]
        work()
        return not all(map(torch.equal, before, [generator.get_state() for generator in generators]))


class Head(Protocol):
    """What makes logits of hidden states, a part at a time: see `heads`."""

    is_linear: ClassVar[bool]
    """Logits are a product of the hidden states and a matrix, and nothing is computed twice by making them in parts."""

    def num_logits(self, model: nn.Module) -> int:
        """Return those of a position."""
        ...

    def body(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        """Return what comes before the head."""
        ...

    def loss(self, model: nn.Module, output: Any, targets: Tensor, chunk: int) -> Tensor:
        """Return the summed cross entropy, so many positions at a time."""
        ...

    def row_loss(self, model: nn.Module, output: Any, targets: Tensor, chunk: int) -> Tensor:
        """Return the same of one of several rows, whose losses are weighted by what is only known later."""
        ...


@dataclass(frozen=True)
class DocumentLoss:
    """Sums the cross entropy of a batch's documents, as transformers would of each alone.

    Args:
        layout: how documents pass through the model.
        head: the model's, where it can be given a part of the hidden states, so that the logits of a large vocabulary
            need not exist all at once; None where it cannot.
        balance: the balancing loss of a mixture of experts; None where there is none.
    """

    layout: Layout
    head: Head | None
    balance: Balance | None = None

    def __call__(self, model: nn.Module, batch: Batch, loss_bytes: int | None = None) -> dict[str, Tensor]:
        """Return the sums by name, "loss" among them.

        Args:
            model: of transformers.
            batch: of `PackedDocuments`.
            loss_bytes: of logits in fp32 that may exist at once; None: what suits the device.
        """
        calls = self.layout.calls(model, batch)
        done = [self._run(model, call, loss_bytes) for call in calls]
        loss = torch.stack([loss for loss, _ in done]).sum()
        if self.balance is None:
            return {"loss": loss}
        return self.balance.add(
            loss, [(output, call.origins) for (_, output), call in zip(done, calls, strict=True)], batch
        )

    def _run(self, model: nn.Module, call: Call, loss_bytes: int | None) -> tuple[Tensor, Any]:
        if self.head is not None:
            width, count, device = self.head.num_logits(model), call.targets.numel(), call.targets.device
            chunk = positions_at_once(width, device, loss_bytes)
            if count > chunk or (self.head.is_linear and is_by_chunks(count, width, device, chunk)):
                output = self.head.body(model, call.inputs)
                return self.head.loss(model, output, call.targets, chunk), output
        output = run(model, call.inputs)
        return next_token_loss(output.logits, call.targets)[0], output
