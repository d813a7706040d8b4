"""How waves pass through a model of transformers that hears them: the loss of CTC (Graves et al., ICML 2006)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hvdtrain.data.text.pair_samples import NOTHING
from hvdtrain.errors import ConfigError, one_line
from hvdtrain.recipes.transformers_models.loading import import_transformers
from hvdtrain.recipes.transformers_models.probing import logits_apart
from hvdtrain.trainer.randomness import one_by_one

Batch = tuple[Tensor, Tensor, Tensor]
"""Of `ClipSamples`."""

_TOLERANCE = 1e-4
"""Of a clip's logits beside others, relative to what they are alone: rounding in fp32 makes about 1e-6."""


@dataclass(frozen=True)
class CtcLoss:
    """Sums over a batch's characters the negative log likelihood of its texts.

    Args:
        blank: token of CTC's blank.
        is_alone: each clip passes through the model by itself, for models to which silence behind a clip is more than
            nothing, such as those that normalise over time.
    """

    blank: int
    is_alone: bool = False
    metrics: tuple[str, ...] = ("loss",)
    """With "unread" in it, the characters of clips that could not be read are summed, too."""

    def logits(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return logits, `(n, frames, V)`, and how many frames of each clip are its own, int64 `(n,)`."""
        waves, lengths, _ = batch
        whole: Any = model
        # What could not be read is heard as silence, and counts for nothing.
        lengths = torch.where(lengths > 0, lengths, waves.shape[1])
        frames = whole._get_feat_extract_output_lengths(lengths).long()
        if not self.is_alone:
            is_sound = torch.arange(waves.shape[1], device=waves.device) < lengths[:, None]
            return whole(waves, attention_mask=is_sound.long()).logits, frames
        rows = [whole(waves[i : i + 1, : int(lengths[i])]).logits[0] for i in one_by_one(len(waves))]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True), frames

    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return the sums that `metrics` names."""
        _, lengths, labels = batch
        logits, frames = self.logits(model, batch)
        if logits.dtype != torch.float64:
            logits = logits.float()
        sizes = (labels != NOTHING).sum(1)
        is_read = lengths > 0
        losses = F.ctc_loss(
            logits.log_softmax(-1).transpose(0, 1),
            labels.clamp_min(0),
            frames,
            sizes * is_read,
            blank=self.blank,
            reduction="none",
        )
        sums = {"loss": torch.where(is_read, losses, 0.0).sum(), "unread": (sizes * ~is_read).sum()}
        return {name: sums[name] for name in self.metrics}


@torch.no_grad()
def try_out(model: nn.Module, batch: Batch, loss: CtcLoss) -> tuple[CtcLoss, str]:
    """Return the loss in the way that holds for this model, and what a person should know of it.

    The judge is the model's own forward pass of each clip alone.

    Raises:
        ConfigError: transformers cannot run the model on waves.
    """
    model.eval()
    try:
        loss(model, batch)
        alone, frames = replace(loss, is_alone=True).logits(model, batch)
        together, _ = loss.logits(model, batch)
        difference = max(
            logits_apart(row[:count], other[:count])
            for row, other, count in zip(alone, together, frames.tolist(), strict=True)
        )
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, NotImplementedError) as error:
        raise ConfigError(f"this model cannot be trained on waves of sound by CTC: {one_line(error)}") from error
    finally:
        model.train()
    if difference <= _TOLERANCE:
        return loss, ""
    return replace(loss, is_alone=True), (
        "padding:    changes what this model hears, so that clips pass through it one at a time, as where it normalises"
        " over time (feat_extract_norm = group)"
    )


def write_down(model: nn.Module, batch: Batch, loss: CtcLoss, tokenizer: Any) -> list[str]:
    """Return what is heard in each clip: the likeliest token of each frame, repeats and blanks left out.

    Args:
        model: in evaluation mode.
        batch: of which labels are not looked at.
        loss: how clips pass through the model.
        tokenizer: for CTC.
    """
    logits, frames = loss.logits(model, batch)
    tokens = logits.argmax(-1)
    is_own = torch.arange(tokens.shape[1], device=tokens.device) < frames[:, None]
    tokens = torch.where(is_own & (batch[1] > 0)[:, None], tokens, loss.blank)
    texts: list[str] = tokenizer.batch_decode(tokens.cpu().numpy())
    return [" ".join(text.split()) for text in texts]


def small_wav2vec2() -> Any:
    """Return the configuration of a model that two CPU cores train in minutes."""
    return import_transformers().Wav2Vec2Config(
        hidden_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=192,
        conv_dim=(32, 48, 64, 96),
        conv_kernel=(20, 8, 8, 3),
        conv_stride=(10, 4, 4, 2),
        feat_extract_activation="relu",
        feat_extract_norm="layer",
        conv_bias=True,
        do_stable_layer_norm=True,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        **dict.fromkeys(("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout"), 0.0),
        **dict.fromkeys(("final_dropout", "layerdrop"), 0.0),
    )
