"""The model of the recipe `seq2seq`, and whether pairs fit it. Needs torch and transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hvdtrain.data.text.pair_samples import TokenizedPairs
from hvdtrain.errors import DataError
from hvdtrain.recipes.seq2seq import EncoderDecoder
from hvdtrain.recipes.transformers_models.auto_classes import load_as
from hvdtrain.recipes.transformers_models.encoder_decoders import PairLoss, small_bart
from hvdtrain.recipes.transformers_models.loading import import_transformers, num_rows
from hvdtrain.recipes.transformers_models.probe import describe

KIND = "AutoModelForSeq2SeqLM"


def load_model(recipe: EncoderDecoder, tokenizer: Any) -> nn.Module:
    """Return the model that the settings name, ready to be trained.

    Raises:
        DataError: there is none, or it has no embeddings for the tokenizer's tokens.
    """
    settings, changes = recipe.model, {}
    config: Any = settings.config
    is_trained_here = recipe.data.tokenizer is None and settings.path is None
    if is_trained_here:
        changes = _tokens_of(tokenizer)
    if settings.path is None and config is None:
        config = small_bart(max(recipe.data.max_source_length, recipe.data.max_target_length))
        if not is_trained_here:
            changes = _tokens_of(tokenizer)
    model: Any = load_as(
        KIND,
        settings.path,
        config,
        changes,
        recipe.train.seed,
        attention=settings.attention,
        trust_remote_code=settings.trust_remote_code,
    )
    if changes:  # what a configuration forces is for the tokens of another tokenizer
        changes.pop("vocab_size")
        model.generation_config = import_transformers().GenerationConfig(**changes)
    if recipe.data.source_prefix:
        model.config.prefix = recipe.data.source_prefix  # where transformers' pipelines look for it, and `generate`
    _check_rows(model, tokenizer)
    trained: nn.Module = model
    return trained


def _tokens_of(tokenizer: Any) -> dict[str, Any]:
    """Return what a configuration says of a tokenizer."""
    begin = tokenizer.bos_token_id
    return {
        "vocab_size": len(tokenizer),
        "decoder_start_token_id": tokenizer.pad_token_id if begin is None else begin,
        **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")},
    }


def _check_rows(model: nn.Module, tokenizer: Any) -> None:
    if len(tokenizer) > num_rows(model):
        raise DataError(
            f"the tokenizer has {len(tokenizer):,} tokens, and the model embeddings for {num_rows(model):,}: give"
            " --data.tokenizer the one that the model was made for"
        )


def check_positions(model: nn.Module, samples: TokenizedPairs) -> None:
    """Raise DataError where a source or a target is longer than what the model was made for."""
    settings: Any = model.config
    most = getattr(settings, "max_position_embeddings", None)
    for name, lengths in (("source", samples.source_lengths), ("target", samples.target_lengths)):
        if most is not None and lengths.max() > most:
            raise DataError(
                f"a {name} has {lengths.max():,} tokens, and the model {most:,} positions: leave such pairs out by"
                f" --data.max-{name}-length {most}"
            )


@torch.no_grad()
def check_longest(model: nn.Module, samples: TokenizedPairs, loss: PairLoss) -> None:
    """Raise DataError where the model fails at the longest source or target: not all say how many positions they have.

    The model is left in training mode.
    """
    model.eval()
    try:
        for lengths in (samples.source_lengths, samples.target_lengths):
            row = int(lengths.argmax())
            loss(model, samples.batch(torch.tensor([row])))
    except (IndexError, RuntimeError) as error:
        source, target = (int(lengths[row]) for lengths in (samples.source_lengths, samples.target_lengths))
        raise DataError(
            f"the model fails at a source of {source:,} tokens with a target of {target:,} ({describe(error)}): leave"
            " what is too long for it out by --data.max-source-length and --data.max-target-length"
        ) from error
    finally:
        model.train()
