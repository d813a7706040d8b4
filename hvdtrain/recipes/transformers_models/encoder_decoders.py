"""How pairs pass through an encoder-decoder of transformers: their loss, and what it says itself, by beam search."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hvdtrain.data.text.pair_samples import NOTHING
from hvdtrain.errors import ConfigError, one_line
from hvdtrain.recipes.transformers_models.forward import run
from hvdtrain.recipes.transformers_models.loading import import_transformers
from hvdtrain.recipes.transformers_models.probing import logits_apart
from hvdtrain.trainer.randomness import one_by_one

Batch = tuple[Tensor, Tensor, Tensor]
"""Of `TokenizedPairs`."""

_TOLERANCE = 1e-3
"""Of a sample's loss, relative to transformers' own."""
_LOGITS_TOLERANCE = 1e-4
"""Of a sample's logits beside others, relative to what they are alone: rounding in fp32 makes about 1e-6."""


@dataclass(frozen=True)
class PairLoss:
    """Sums the cross entropy of a batch's targets.

    Args:
        smoothing: share of each target that is spread over all tokens, in training.
        is_alone: each sample passes through the model by itself, for models to which padding is more than nothing.
    """

    smoothing: float = 0.0
    is_alone: bool = False

    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return the sum over the tokens of the targets, as "loss"."""
        if not self.is_alone or not len(batch[0]):
            return {"loss": self._of(model, batch)}
        rows = _rows(batch)
        return {"loss": torch.stack([self._of(model, rows[i]) for i in one_by_one(len(rows))]).sum()}

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return logits, `(n, T, V)`, of samples that pass through the model together."""
        sources, is_text, targets = batch
        before = before_targets(model, targets)
        output = run(model, {"input_ids": sources, "attention_mask": is_text, "decoder_input_ids": before})
        logits: Tensor = output.logits
        return logits

    def _of(self, model: nn.Module, batch: Batch) -> Tensor:
        targets = batch[2]
        logits = self.logits(model, batch).flatten(0, 1)
        if logits.dtype != torch.float64:
            logits = logits.float()
        smoothing = self.smoothing if model.training else 0.0
        return F.cross_entropy(
            logits, targets.flatten(), ignore_index=NOTHING, label_smoothing=smoothing, reduction="sum"
        )


def before_targets(model: nn.Module, targets: Tensor) -> Tensor:
    """Return what is before each token of the targets, int64 `(n, T)`.

    Raises:
        ConfigError: the model does not say what begins a target.
    """
    whole: Any = model
    # The model's own way to put what begins a target before it: T5 and BART begin with different tokens.
    own: Callable[..., Tensor] | None = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if own is not None:
        return own(labels=targets)
    begin = getattr(whole.config, "decoder_start_token_id", None)
    if begin is None:
        raise ConfigError("the model's config.json has no decoder_start_token_id, which begins a target: add it")
    before = targets.new_full(targets.shape, begin)  # M2M100 and NLLB do it within forward alone
    before[:, 1:] = targets[:, :-1]
    return before.masked_fill(before == NOTHING, whole.config.pad_token_id or 0)


def _rows(batch: Batch) -> list[Batch]:
    """Return each sample without padding."""
    sources, is_text, targets = batch
    lengths = zip(is_text.sum(1).tolist(), (targets != NOTHING).sum(1).tolist(), strict=True)
    return [
        (sources[i : i + 1, :source], is_text[i : i + 1, :source], targets[i : i + 1, :target])
        for i, (source, target) in enumerate(lengths)
    ]


@torch.no_grad()
def try_out(model: nn.Module, batch: Batch, loss: PairLoss) -> tuple[PairLoss, str]:
    """Return the loss in the way that holds for this model, and what a person should know of it.

    The judge is transformers' own loss of each sample alone. The model is left in training mode.

    Raises:
        ConfigError: transformers cannot run the model on these samples.
    """
    rows = _rows(batch)
    model.eval()
    try:
        alone = torch.stack([loss(model, row)["loss"] for row in rows])
        outputs = [_their_own(model, row) for row in rows]
        theirs = torch.stack([output.loss * row[2].numel() for output, row in zip(outputs, rows, strict=True)])
        own = [loss.logits(model, row)[0] for row in rows]
        begins_otherwise = any(
            logits_apart(output.logits[0], logits) > _TOLERANCE for output, logits in zip(outputs, own, strict=True)
        )
        together = loss.logits(model, batch)
        difference = max(
            logits_apart(logits, other[: len(logits)]) for logits, other in zip(own, together, strict=True)
        )
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, NotImplementedError) as error:
        raise ConfigError(f"this model cannot be trained on pairs: {one_line(error)}") from error
    finally:
        model.train()
    if begins_otherwise:
        raise ConfigError(
            "this model cannot be trained on pairs: given labels, it puts something else before them than it says"
        )
    lines = []
    if not torch.allclose(alone, theirs, rtol=_TOLERANCE, atol=_TOLERANCE):
        lines.append(
            f"loss:       the cross entropy alone, which is {float(alone.sum()):.4g} where transformers has"
            f" {float(theirs.sum()):.4g}: it adds something"
        )
    if difference > _LOGITS_TOLERANCE:
        lines.append("padding:    changes what this model says, so that samples pass through it one at a time")
        loss = replace(loss, is_alone=True)
    return loss, "\n".join(lines)


def _their_own(model: nn.Module, row: Batch) -> Any:
    sources, is_text, targets = row
    return run(model, {"input_ids": sources, "attention_mask": is_text, "labels": targets})


@torch.no_grad()
def translate(
    model: nn.Module, tokenizer: Any, sources: Tensor, is_text: Tensor, beams: int, longest: int
) -> list[str]:
    """Return what the model makes of sources, by transformers' own search.

    Args:
        model: in evaluation mode.
        tokenizer: turns its tokens into text.
        sources: int64 `(n, S)`, filled up.
        is_text: int64 `(n, S)`, 1 where a source is.
        beams: of the search; 1 takes the likeliest token each time.
        longest: the most tokens of an answer; a model with fewer positions ends there.
    """
    whole: Any = model
    positions = getattr(whole.config, "max_position_embeddings", None)
    if positions is not None:
        longest = min(longest, positions - 1)  # one is for what begins an answer
    tokens = whole.generate(
        input_ids=sources,
        attention_mask=is_text,
        num_beams=beams,
        do_sample=False,
        max_new_tokens=longest,
        max_length=None,
        use_cache=True,
    )
    texts: list[str] = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return [text.strip() for text in texts]


def small_bart(num_positions: int) -> Any:
    """Return the configuration of a model that two CPU cores train in minutes."""
    return import_transformers().BartConfig(
        d_model=96,
        **dict.fromkeys(("encoder_layers", "decoder_layers"), 2),
        **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
        **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 192),
        max_position_embeddings=num_positions,
        dropout=0.0,
        init_std=0.05,
    )
