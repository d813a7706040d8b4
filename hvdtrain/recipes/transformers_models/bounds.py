"""Attention by the bounds of packed documents, for models of transformers: no mask, so that GPUs take flash attention.

transformers asks for attention by a name, and hands a mask of four dimensions on as it is. Here the bounds travel in
its place, int32 `(1, 1, 1, n + 1)`, to the attention that is known by `NAME`. Without them, as when questions are
answered, that is transformers' own `sdpa`.

Where documents begin is the data set's to say (`DocumentsWithStarts`), so that no step waits for the GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hvdtrain.data.text.packed import begins_of
from hvdtrain.data.text.windows import starts_of
from hvdtrain.models.documents import Bounds, Scores, attend, bounds_of, has_kernel
from hvdtrain.models.linear import product_dtype
from hvdtrain.recipes.transformers_models.layouts import Batch, Call, Layout, origins_of

NAME = "hvdtrain_documents"
# What transformers' `sdpa` looks at besides what `attention` has names for, or refuses.
_NOT_KNOWN = ("position_bias", "softcap", "cache", "s_aux")

Asked = tuple[int, int, int, Scores]
"""Heads of queries, heads of keys and values, the size of a head, and what is asked for besides."""
_asked: set[Asked] | None = None
"""What attention by bounds was asked for while a model is tried; None: nobody wants to know."""


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Return attention `(B, T, H, D)` of `(B, H, T, D)` to `(B, K, T, D)`, and no weights, as transformers asks for it.

    Args:
        module: the layer.
        query: of all tokens of a batch.
        key: of the same.
        value: of the same.
        attention_mask: bounds as `ByBounds` gives them; or what `sdpa` takes.
        dropout: the share of weights that is dropped.
        scaling: of the products.
        sliding_window: how many tokens one sees, itself among them. Masks have it in them, so `sdpa` ignores it.
        others: what else a model's layers give.

    Raises:
        ValueError: bounds cannot be had together with something that is asked for.
    """
    if attention_mask is None or attention_mask.dtype != torch.int32:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        more = {"dropout": dropout, "scaling": scaling, "sliding_window": sliding_window, **others}
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **more)
        return out, None
    strange = [name for name in _NOT_KNOWN if others.get(name) is not None]
    if strange or dropout or value.shape != key.shape or query.shape[2] != key.shape[2]:
        raise ValueError(f"no kernel for documents has {', '.join(strange) or 'dropout, or values of another shape'}")
    dtype = product_dtype(value)  # as for torch's own attention, which autocast knows
    scores = Scores(scaling, sliding_window)
    if _asked is not None:
        _asked.add((query.shape[1], key.shape[1], key.shape[3], scores))
    bounds = Bounds(attention_mask.flatten(), query.shape[2])
    out = attend(query.to(dtype), key.to(dtype), value.to(dtype), bounds, scores)
    return out.transpose(1, 2), None


@dataclass(frozen=True)
class ByBounds(Layout):
    """Documents by their bounds.

    Args:
        device: where the model is trained.
        dtype: in which its attention is computed.
    """

    device: torch.device
    dtype: torch.dtype
    tries_training = True

    def prepare(self, model: nn.Module) -> Callable[[], None]:
        """Have the model ask for attention by `NAME`; returns what undoes it.

        Raises:
            ValueError: it cannot.
        """
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask

        global _asked
        AttentionInterface.register(NAME, attention)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        whole: Any = model
        before = whole.config._attn_implementation
        if before != "sdpa":
            raise ValueError(f"its attention is {before}")
        whole.set_attn_implementation(NAME)
        _asked = set()

        def undo() -> None:
            global _asked
            _asked = None
            whole.set_attn_implementation(before)

        return undo

    def problem(self) -> str:
        """Return why the attention that the model has asked for cannot be computed so; empty: it can."""
        global _asked
        asked, _asked = _asked, None
        if not asked:
            return "its attention is its own"
        if not all(has_kernel(self.device, self.dtype, *own) for own in sorted(asked, key=str)):
            return "the kernel is not there for it"
        return ""


def _calls(model: nn.Module, batch: Batch) -> list[Call]:
    """Give bounds in the place of a mask, and positions that begin anew with each document."""
    tokens, targets, documents, positions, *more = batch
    starts = more[0] if more else starts_of(begins_of(documents))
    bounds = bounds_of(starts, tokens.shape[1]).starts.view(1, 1, 1, -1)
    inputs = {"input_ids": tokens, "attention_mask": bounds, "position_ids": positions}
    return [Call(inputs, targets, origins_of(documents))]


def by_bounds(device: torch.device, dtype: torch.dtype) -> ByBounds:
    """Return the layout for models that are trained there, with attention in this type."""
    return ByBounds("packed, by their bounds", _calls, device, dtype)
