"""Muon for the matrices of hidden layers, AdamW for all the rest."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hvdtrain.optim.adamw import AdamWConfig, build_adamw
from hvdtrain.settings import setting

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class MuonConfig(AdamWConfig):
    """Muon and its learning-rate schedule; the settings of AdamW are for embeddings, the output layer and vectors."""

    name: str = "muon"
    """The optimizer; see --optim.name of any recipe for the others."""
    momentum: float = setting(0.95, minimum=0, below=1)
    """Muon: of the mean of gradients. Runs of a few hundred steps gain by less."""
    embedding_lr_factor: float = setting(1.0, above=0)
    """Muon: what the learning rate of embeddings and the output layer is of --optim.peak-lr."""

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return Muon for the matrices of hidden layers, and AdamW for embeddings, the output layer and vectors.

        Muon's update is scaled to the size of AdamW's (arXiv:2502.16982, section 2.2): one learning rate serves both.
        """
        from hvdtrain.optim.composite import Composite
        from hvdtrain.optim.groups import trainable
        from hvdtrain.optim.orthogonal import Muon

        hidden = _hidden_matrices(model)
        own = set(hidden)
        rest = [p for p in trainable(model) if p not in own]
        parts: list[torch.optim.Optimizer] = []
        if hidden:
            parts.append(Muon(hidden, self.peak_lr, self.weight_decay, self.momentum))
        wide = [p for p in rest if p.ndim >= 2 and self.embedding_lr_factor != 1]
        others = [p for p in rest if p.ndim < 2 or self.embedding_lr_factor == 1]
        for some, factor in (wide, self.embedding_lr_factor), (others, 1.0):
            if some:
                parts.append(build_adamw(replace(self, peak_lr=self.peak_lr * factor), model, some))
        return Composite([group for part in parts for group in part.param_groups], parts)


def _hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Return all trainable matrices but embeddings and the last linear layer's."""
    from torch import nn

    from hvdtrain.optim.groups import trainable

    embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag)}
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    ends = {*embeddings, *(linear.weight for linear in linears[-1:])}
    return [p for p in trainable(model) if p.ndim == 2 and p not in ends]
