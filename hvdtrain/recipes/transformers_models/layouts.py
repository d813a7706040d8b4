"""How a batch of packed documents becomes calls of a model of transformers.

Shapes: n samples of T tokens, as `PackedDocuments.batch` returns them; R rows of L tokens in a call.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hvdtrain.data.text.packed import begins_of
from hvdtrain.models.loss import IGNORE_INDEX

Batch = tuple[Tensor, ...]


@dataclass(frozen=True)
class Call:
    """One forward pass."""

    inputs: dict[str, Any]
    """Arguments of the model's forward pass; `input_ids`, int64 `(R, L)`, among them."""
    targets: Tensor
    """int64 `(R, L)`, `IGNORE_INDEX` where there is nothing to predict."""
    origins: Tensor
    """int64 `(R, L)`, each token's place in the flattened batch, `sample * T + position`; -1 for padding."""


@dataclass(frozen=True)
class Layout:
    """A way to give documents to a model so that none sees another."""

    name: str
    """What a person calls it."""
    calls: Callable[[nn.Module, Batch], list[Call]]
    """Returns the calls of this model for a batch."""
    tries_training: ClassVar[bool] = False
    """Whether what it needs may be there in evaluation and not in training."""

    def prepare(self, model: nn.Module) -> Callable[[], None]:
        """Change how the model computes, before anything is called; returns what undoes it."""
        return lambda: None

    def problem(self) -> str:
        """Return why it does not do, after the model was tried; empty: it does."""
        return ""


def _by_positions(model: nn.Module, batch: Batch) -> list[Call]:
    """Give positions that begin anew with each document: from these transformers builds the mask, windows included."""
    tokens, targets, documents, positions = batch
    return [Call({"input_ids": tokens, "position_ids": positions}, targets, origins_of(documents))]


def _by_masks(model: nn.Module, batch: Batch) -> list[Call]:
    """Have transformers build the masks ahead, from these positions, as it does to generate text."""
    from transformers import masking_utils

    tokens, targets, documents, positions = batch
    whole: Any = model
    create = getattr(whole, "create_masks_for_generate", masking_utils.create_masks_for_generate)
    mask = create(
        config=whole.config,
        # Only shape, type and device are looked at.
        inputs_embeds=torch.empty(*tokens.shape, 1, dtype=_dtype(model), device=tokens.device),
        attention_mask=None,
        past_key_values=None,
        position_ids=positions,
    )
    inputs = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}
    return [Call(inputs, targets, origins_of(documents))]


def _dtype(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def origins_of(documents: Tensor) -> Tensor:
    """Return each token's place in the flattened batch, int64 `(n, T)`, -1 for padding, given documents' numbers."""
    places = torch.arange(documents.numel(), device=documents.device).view_as(documents)
    return places.where(documents >= 0, -1)


def _in_rows(model: nn.Module, batch: Batch) -> list[Call]:
    """Give every document a row of its own, in calls that are not larger than the batch.

    What fills a row up comes after the document, where no token of it looks.
    """
    tokens, _, documents, _ = batch
    starts, lengths = _parts(documents)
    order = lengths.argsort(descending=True, stable=True)
    starts, lengths = starts[order], lengths[order]
    calls, first = [], 0
    while first < len(lengths):
        rows = max(1, tokens.numel() // int(lengths[first]))
        chosen = slice(first, first + rows)
        calls.append(_rows(batch, starts[chosen], lengths[chosen], int(lengths[first])))
        first += rows
    return calls


def _in_equal_rows(model: nn.Module, batch: Batch) -> list[Call]:
    """Give every document a row of its own, of T tokens: call j has the j-th document of each sample.

    For models that draw random numbers, which belong to samples (`trainer/randomness.py`): a call's rows are the
    samples of the batch, and their shape does not depend on the other samples.
    """
    _, _, documents, _ = batch
    starts, lengths = _parts(documents)
    n, length = documents.shape
    sample = starts // length
    number = torch.arange(len(starts), device=starts.device) - torch.searchsorted(sample, sample)
    calls = []
    for j in range(int(number.max()) + 1):
        rows = torch.zeros(2, n, dtype=torch.int64, device=starts.device)
        rows[:, sample[number == j]] = torch.stack([starts, lengths])[:, number == j]
        calls.append(_rows(batch, rows[0], rows[1], length))
    return calls


def _parts(documents: Tensor) -> tuple[Tensor, Tensor]:
    """Return where the parts of documents begin in the flattened batch, and their lengths, int64 `(parts,)` each."""
    n, length = documents.shape
    starts = begins_of(documents).flatten().nonzero().flatten()
    ends = torch.cat((starts[1:], starts.new_tensor([n * length])))
    is_text = documents.flatten()[starts] >= 0
    return starts[is_text], (ends - starts)[is_text]


def _rows(batch: Batch, starts: Tensor, lengths: Tensor, length: int) -> Call:
    tokens, targets, _, _ = batch
    step = torch.arange(length, device=tokens.device)
    origins = (starts[:, None] + step).where(step < lengths[:, None], -1)
    at = origins.clamp(min=0)
    wanted = targets.flatten()[at].where(origins >= 0, IGNORE_INDEX)
    return Call({"input_ids": tokens.flatten()[at]}, wanted, origins)


def pack(documents: Sequence[Tensor]) -> Batch:
    """Return two samples, the first with two documents; targets are the tokens after each, of its document."""
    tokens = torch.cat(list(documents)).view(2, -1)
    lengths = [len(document) for document in documents]
    number = torch.arange(len(documents)).repeat_interleave(torch.tensor(lengths)).to(tokens.device)
    position = torch.cat([torch.arange(n) for n in lengths]).to(tokens.device)
    targets = [
        torch.cat((document[1:], document.new_full((min(1, len(document)),), IGNORE_INDEX))) for document in documents
    ]
    return tokens, torch.cat(targets).view_as(tokens), number.view_as(tokens), position.view_as(tokens)


BY_POSITIONS = Layout("packed", _by_positions)
BY_MASKS = Layout("packed, masks built ahead", _by_masks)
IN_ROWS = Layout("one a row, padded", _in_rows)
IN_EQUAL_ROWS = dataclasses.replace(IN_ROWS, calls=_in_equal_rows)
