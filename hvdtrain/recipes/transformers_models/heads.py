"""What a model makes of its last hidden states, a part at a time: so that not all logits need exist at once.

Where logits are nothing but a product with the output embeddings, `ProductHead` has the loss of a batch without
computing anything twice. Other heads (biases, further layers, scales, caps) are the model's own code, run on a part of
the hidden states.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hvdtrain.models.compilation import is_compiled
from hvdtrain.models.linear import product_of
from hvdtrain.models.loss import chunked_loss, next_token_loss
from hvdtrain.models.private_torch import compile_in_place
from hvdtrain.recipes.transformers_models.forward import arguments, draws, run

Inputs = dict[str, Any]


@dataclass(frozen=True)
class ProductHead:
    """Logits are the product of the last hidden states and the output embeddings, `(V, C)`."""

    is_linear: ClassVar[bool] = True

    def num_logits(self, model: nn.Module) -> int:
        """Return V."""
        whole: Any = model
        return int(whole.get_output_embeddings().weight.shape[0])

    def body(self, model: nn.Module, inputs: Inputs) -> Any:
        """Return the output of the model without its head; hidden states `(R, L, C)` come first."""
        whole: Any = model
        if is_compiled(model) and not is_compiled(whole.base_model):  # called past the model, it compiles by itself
            compile_in_place(whole.base_model)
        return run(whole.base_model, inputs)

    def loss(self, model: nn.Module, output: Any, targets: Tensor, chunk: int) -> Tensor:
        """Return the summed cross entropy, `chunk` positions at a time.

        Args:
            model: of transformers.
            output: of `body`.
            targets: int64 `(R, L)`.
            chunk: positions whose logits exist at a time.
        """
        whole: Any = model
        head = whole.get_output_embeddings()
        return chunked_loss(output[0], head.weight, targets, chunk, product_of(head))

    def row_loss(self, model: nn.Module, output: Any, targets: Tensor, chunk: int) -> Tensor:
        """Return the same of one of several rows, whose losses are weighted by what is only known later.

        What `loss` keeps is the gradient by all weights of the head, here once for each row: `(V, C)` numbers. Where
        they are trained, logits are computed once more instead.
        """
        whole: Any = model
        head = whole.get_output_embeddings()
        if not (torch.is_grad_enabled() and head.weight.requires_grad):
            return self.loss(model, output, targets, chunk)
        return _recomputed(head, output[0], targets, chunk)


@dataclass(frozen=True)
class OwnHead:
    """Logits are what the model's own forward pass makes of the output of one of its parts, position by position.

    A part's logits are computed once more in the backward pass.

    Args:
        part: name of the module whose output holds the last hidden states.
        width: V.
    """

    part: str
    width: int
    is_linear: ClassVar[bool] = False

    def num_logits(self, model: nn.Module) -> int:
        """Return V."""
        return self.width

    def body(self, model: nn.Module, inputs: Inputs) -> Any:
        """Return the output of the part, called as the model calls it; nothing after it is computed."""

        def leave(module: nn.Module, args: Any, output: Any) -> NoReturn:
            raise _Reached(output)

        hook = model.get_submodule(self.part).register_forward_hook(leave)
        try:
            # Not the module's call: that of a compiled model cannot be left.
            model.forward(**arguments(model, inputs))
        except _Reached as reached:
            return reached.output
        finally:
            hook.remove()
        raise ValueError(f"the model's forward pass has not called {self.part}")

    def loss(self, model: nn.Module, output: Any, targets: Tensor, chunk: int) -> Tensor:
        """Return the summed cross entropy, `chunk` positions at a time; for arguments see `ProductHead.loss`."""
        return _recomputed(lambda part: self.logits(model, output, part), _hidden(output), targets, chunk)

    def row_loss(self, model: nn.Module, output: Any, targets: Tensor, chunk: int) -> Tensor:
        """Return the same of one of several rows."""
        return self.loss(model, output, targets, chunk)

    def logits(self, model: nn.Module, output: Any, hidden: Tensor) -> Tensor:
        """Return what the model makes of these hidden states, `(1, n, C)`: logits, `(1, n, V)`."""
        tokens = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
        with _gives(model.get_submodule(self.part), _with_hidden(output, hidden)):
            logits: Tensor = model.forward(**arguments(model, {"input_ids": tokens})).logits
        return logits


def _recomputed(logits_of: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, chunk: int) -> Tensor:
    """Return the summed cross entropy, `chunk` positions at a time; the backward pass computes logits once more.

    Args:
        logits_of: maps hidden states `(1, n, C)` to logits `(1, n, V)`; draws no random numbers.
        hidden: `(R, L, C)`.
        targets: int64 `(R, L)`.
        chunk: positions whose logits exist at a time.
    """

    def of(part: Tensor, wanted: Tensor) -> Tensor:
        return next_token_loss(logits_of(part), wanted)[0]

    flat, wanted = hidden.flatten(0, 1)[None], targets.flatten()[None]
    parts = zip(torch.split(flat, chunk, 1), torch.split(wanted, chunk, 1), strict=True)
    losses = [checkpoint(of, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    return torch.stack(losses).sum()


class _Reached(Exception):  # noqa: N818 (no error)
    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


@contextlib.contextmanager
def _gives(module: nn.Module, output: Any) -> Iterator[None]:
    """Within, the module's forward pass computes nothing and returns this."""
    before = vars(module).get("forward")
    module.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def _hidden(output: Any) -> Tensor:
    hidden: Tensor = output if isinstance(output, Tensor) else output[0]
    return hidden


def _with_hidden(output: Any, hidden: Tensor) -> Any:
    """Return an output of this kind that holds the hidden states, and else nothing that belongs to other tokens."""
    if isinstance(output, Tensor):
        return hidden
    if isinstance(output, tuple):
        return (hidden, *output[1:])
    return type(output)(**{next(iter(output)): hidden})


def row_of(output: Any, row: int) -> Any:
    """Return a part's output, of what `Head.body` returns, with the hidden states of one row alone, `(1, L, C)`."""
    return _with_hidden(output, _hidden(output)[row : row + 1])


def find_own_head(model: nn.Module, inputs: Inputs, logits: Tensor, tolerance: float) -> OwnHead | None:
    """Return the head of a model that gives the logits from hidden states a few positions at a time; None if none does.

    Parts of the model are tried in the order in which its forward pass calls them: the first that holds is the one
    after which the least is left to do.

    Args:
        model: of transformers, in evaluation.
        inputs: arguments of its forward pass.
        logits: `(R, L, V)`, what it makes of them.
        tolerance: of their largest error, relative to the largest logit.
    """
    for name in _called(model, inputs, logits.shape):
        head = OwnHead(name, logits.shape[-1])
        try:
            output = head.body(model, inputs)
            hidden = _hidden(output).flatten(0, 1)[None]
            parts = torch.split(hidden, max(1, hidden.shape[1] // 3), 1)
            ours = torch.cat([head.logits(model, output, part) for part in parts], 1)
        except Exception:  # whatever a model's code does with hidden states that it does not expect
            continue
        if float((ours.view_as(logits) - logits).abs().max()) <= tolerance * float(logits.abs().max()):
            return None if _draws(model, head, output, parts[0]) else head
    return None


def _called(model: nn.Module, inputs: Inputs, shape: torch.Size) -> list[str]:
    """Return the modules that the model's forward pass calls itself and whose outputs may be the last hidden states."""
    found: list[str] = []
    depth = 0
    hooks = []

    def enter(module: nn.Module, args: Any) -> None:
        nonlocal depth
        depth += 1

    def leave(module: nn.Module, args: Any, output: Any, name: str) -> None:
        nonlocal depth
        depth -= 1
        first = output if isinstance(output, Tensor) else output[0] if output else None
        if depth == 0 and isinstance(first, Tensor) and first.is_floating_point() and first.shape[:2] == shape[:2]:
            found.extend([name] if first.shape[-1] < shape[-1] else [])  # what is as wide as logits saves nothing

    for name, module in model.named_modules():
        if name:
            hooks.append(module.register_forward_pre_hook(enter))
            hooks.append(module.register_forward_hook(_named(leave, name)))
    try:
        model.forward(**arguments(model, inputs))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _named(leave: Any, name: str) -> Any:
    return lambda module, args, output: leave(module, args, output, name)


def _draws(model: nn.Module, head: OwnHead, output: Any, hidden: Tensor) -> bool:
    """Return whether the head draws random numbers while the model is trained: then they would be others in parts."""
    was_training = model.training
    model.train()
    try:
        return draws(hidden.device, lambda: head.logits(model, output, hidden))
    finally:
        model.train(was_training)
