"""The balancing loss of mixtures of experts (Switch Transformers, arXiv:2101.03961, equations 4 to 6)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hvdtrain.models.loss import IGNORE_INDEX


@dataclass(frozen=True)
class Balance:
    """Adds the balancing loss that transformers adds where a configuration has `output_router_logits`.

    It is the number of experts times the sum over experts of (how often each is chosen) x (its mean probability). The
    means are over the layers and the tokens of a *sample*; samples are weighted by the tokens that they predict.
    transformers takes the means over a micro-batch: there the loss depends on how a batch is cut, here it is a sum over
    samples, the same on any number of ranks. With one sample in a micro-batch the two are equal.

    Args:
        coefficient: what the loss is multiplied by.
        top_k: experts of a token.
    """

    coefficient: float
    top_k: int

    def add(self, loss: Tensor, outputs: Sequence[tuple[Any, Tensor]], batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Return "loss", the cross entropy with the gradient of both terms, and "balance_loss".

        Args:
            loss: the cross entropy, a sum.
            outputs: those of the model's calls, each with its tokens' places in the flattened batch.
            batch: tokens and targets, int64 `(n, T)`, and more.
        """
        tokens, targets, *_ = batch
        n, length = tokens.shape
        per_sample = self.of_samples(
            [output.router_logits for output, _ in outputs],
            [origins.flatten().div(length, rounding_mode="floor") for _, origins in outputs],
            n,
        )
        balance = (per_sample * (targets != IGNORE_INDEX).sum(1)).sum()
        term = self.coefficient * balance
        # The value stays the cross entropy, comparable between runs; only the gradient is that of the sum.
        return {"loss": loss + term - term.detach(), "balance_loss": balance}

    def of_samples(self, logits: Sequence[Sequence[Tensor]], samples: Sequence[Tensor], n: int) -> Tensor:
        """Return each sample's loss, `(n,)`.

        Args:
            logits: for each call and layer, `(R L, experts)`, or `(R, L, experts)`.
            samples: for each call, int64 `(R L,)`, the tokens' samples; negative for padding.
            n: the number of samples.
        """
        first = logits[0][0]
        experts = first.shape[-1]
        dtype = torch.promote_types(first.dtype, torch.float32)
        chosen, probability = (torch.zeros(n, experts, dtype=dtype, device=first.device) for _ in range(2))
        count = torch.zeros(n, dtype=dtype, device=first.device)
        for layers, sample in zip(logits, samples, strict=True):
            at = sample.clamp(min=0)
            is_text = (sample >= 0).to(dtype)
            for layer in layers:
                flat = layer.reshape(-1, experts).to(dtype).softmax(-1)
                picks = torch.zeros_like(flat).scatter_(1, flat.topk(self.top_k, dim=-1).indices, 1.0)
                chosen = chosen.index_add(0, at, picks * is_text[:, None])
                probability = probability.index_add(0, at, flat * is_text[:, None])
                count = count.index_add(0, at, is_text)
        return experts * (chosen * probability).sum(1) / count.clamp(min=1).square()
