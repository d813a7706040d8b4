"""Build the optimizer that a configuration asks for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import nn

from hvdtrain.errors import ConfigError
from hvdtrain.settings import OptimConfig, nearest

_OWN_NAMES = ("adamw", "sgd", "muon")
# These need the loss again (LBFGS), or gradients that only sparse embeddings have.
_UNFIT = ("Optimizer", "LBFGS", "SparseAdam", "Muon")


def build_optimizer(optim: OptimConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer over the model's trainable parameters, matrices decayed and vectors not.

    Norm gains and biases (fewer than two dimensions) are left out of weight decay, as is usual for transformers, and
    so are embeddings with sparse gradients.

    Raises:
        ConfigError: there is no such optimizer.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if optim.name == "muon":
        return _build_muon(optim, model)
    return _build(optim, model, parameters)


def _build(optim: OptimConfig, model: nn.Module, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    # torch cannot decay a weight whose gradient is sparse.
    sparse = {id(module.weight) for module in model.modules() if getattr(module, "sparse", False) is True}
    decayed = [parameter for parameter in parameters if parameter.ndim >= 2 and id(parameter) not in sparse]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": optim.weight_decay},
        {"params": [p for p in parameters if all(p is not other for other in decayed)], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if optim.name == "sgd":
        return torch.optim.SGD(groups, lr=optim.peak_lr, momentum=optim.momentum)
    if optim.name in ("adamw", "muon"):
        betas, is_fused = (optim.beta1, optim.beta2), optim.kernel == "fused"
        is_foreach = None if is_fused else optim.kernel == "foreach"
        return torch.optim.AdamW(
            groups, lr=optim.peak_lr, betas=betas, eps=optim.eps, fused=is_fused, foreach=is_foreach
        )
    kind: Any = _torch_optimizers().get(optim.name)
    if kind is None:
        known = [*_OWN_NAMES, *_torch_optimizers()]
        raise ConfigError(f"--optim.name: there is no optimizer '{optim.name}'{nearest(optim.name, known)}")
    if "weight_decay" not in inspect.signature(kind).parameters:
        groups = [{"params": group["params"]} for group in groups]
    return cast(torch.optim.Optimizer, kind(groups, lr=optim.peak_lr))


def _torch_optimizers() -> dict[str, type[torch.optim.Optimizer]]:
    kinds = {name: value for name, value in vars(torch.optim).items() if isinstance(value, type)}
    return {
        name: kind for name, kind in kinds.items() if issubclass(kind, torch.optim.Optimizer) and name not in _UNFIT
    }


def _build_muon(optim: OptimConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Return Muon for the matrices of hidden layers, and AdamW for embeddings, the output layer and vectors.

    Muon's update is scaled to the size of AdamW's (arXiv:2502.16982, section 2.2), so one learning rate serves both.

    Raises:
        ConfigError: this torch has no Muon.
    """
    muon = getattr(torch.optim, "Muon", None)
    if muon is None:
        raise ConfigError(f"--optim.name muon needs torch 2.9, this is {torch.__version__}: use adamw")
    embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag)}
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    ends = {*embeddings, *(linear.weight for linear in linears[-1:])}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    hidden = [p for p in trainable if p.ndim == 2 and all(p is not end for end in ends)]
    rest = [p for p in trainable if all(p is not other for other in hidden)]
    parts: list[torch.optim.Optimizer] = []
    if hidden:
        parts.append(muon(hidden, lr=optim.peak_lr, weight_decay=optim.weight_decay, adjust_lr_fn="match_rms_adamw"))
    if rest:
        parts.append(_build(optim, model, rest))
    return Composite([group for part in parts for group in part.param_groups], parts)


class Composite(torch.optim.Optimizer):
    """Several optimizers over different parameters that step, save and load as one.

    Args:
        groups: the parts' own parameter groups, in their order.
        parts: the optimizers.
    """

    def __init__(self, groups: list[dict[str, Any]], parts: Sequence[torch.optim.Optimizer] = ()) -> None:
        super().__init__(groups, {})
        self._parts = list(parts)
        self._num_groups = [len(part.param_groups) for part in parts]

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Take a step with each, on this optimizer's groups and state: loading replaces them."""
        loss = closure() if closure is not None else None
        start = 0
        for part, count in zip(self._parts, self._num_groups, strict=True):
            part.param_groups = self.param_groups[start : start + count]
            part.state = self.state
            part.step()
            start += count
        return loss
