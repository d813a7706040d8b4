"""The task of `recipes/hf.py`: documents, the model and how they pass through it. Needs torch and transformers."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hvdtrain.data.config import cache_dir
from hvdtrain.data.text.chat import DocumentReader
from hvdtrain.data.text.packed import PackedDocuments, largest_token, write_packed
from hvdtrain.data.text.splits import find_splits
from hvdtrain.errors import ConfigError, DataError
from hvdtrain.recipes.choices import choice_evaluation
from hvdtrain.recipes.hf import DocumentsConfig, Transformers
from hvdtrain.recipes.transformers_models.loading import (
    attention_of,
    check_length,
    fit_embeddings,
    identity,
    load_model,
    load_tokenizer,
    write_model_files,
)
from hvdtrain.recipes.transformers_models.probe import NOT_TRIED, Way, find_way
from hvdtrain.trainer.task import Evaluation, Task


def build_task(recipe: Transformers, say: Callable[[str], None]) -> Task:
    """Return the task; `say` tells a person what takes long."""
    tokenizer = load_tokenizer(_tokenizer_source(recipe), recipe.model.trust_remote_code)
    folder = _prepare(recipe.data, tokenizer, say)
    length = recipe.data.sequence_length
    train, held_out = (PackedDocuments(folder, name, length) for name in ("train", "val"))
    for name, samples in (("training", train), ("held-out", held_out)):
        if len(samples) == 0:
            raise DataError(f"the {name} documents have nothing to predict: use more, or give --data.val-path")
    settings = recipe.model
    model = load_model(
        settings.path, settings.config, settings.attention, recipe.train.seed, settings.trust_remote_code
    )
    embeddings = fit_embeddings(model, len(tokenizer), largest_token(folder), settings.resize_embeddings)
    check_length(model, length)
    way = _try_out(model, train, length)
    source = recipe.data.path or "Python standard library"
    lines = (
        f"data:       {source}: {train.num_tokens:,} tokens to predict in {len(train):,} samples,"
        f" {held_out.num_tokens:,} held out, vocabulary {len(tokenizer):,}",
        f"documents:  {way}",
        embeddings,
        "" if attention_of(model) == "sdpa" else f"attention:  {attention_of(model)}",
    )
    return Task(
        model=model,
        train_data=train,
        val_data=held_out,
        loss_sums=way.loss,
        metrics=("loss",) if way.loss.balance is None else ("loss", "balance_loss"),
        evaluations=_questions(recipe, tokenizer, length),
        unit="tokens",
        summarize=lambda means: {**means, "perplexity": math.exp(min(means["loss"], 700.0))},
        write_model_files=lambda folder: write_model_files(folder, model, tokenizer),
        description="\n".join(filter(None, lines)),
        fingerprint=f"{folder.name} {length}",
    )


def _tokenizer_source(recipe: Transformers) -> str:
    return recipe.data.tokenizer or recipe.model.path or str(Path(recipe.model.config or "").parent)


def _questions(recipe: Transformers, tokenizer: Any, length: int) -> tuple[Evaluation, ...]:
    if recipe.eval.choices is None:
        return ()
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return choice_evaluation(
        recipe.eval.choices,
        lambda text: tokenizer(text, add_special_tokens=False)["input_ids"],
        begin,
        length,
        lambda model, tokens: model(input_ids=tokens, use_cache=False).logits,
    )


def _prepare(data: DocumentsConfig, tokenizer: Any, say: Callable[[str], None]) -> Path:
    splits = dict(zip(("train", "val"), find_splits(data, say), strict=True))
    if data.text_field != "text" and not any(d.path.suffix == ".jsonl" for part in splits.values() for d in part):
        raise ConfigError(f"--data.text-field has no effect: no file of {data.path} is a .jsonl file")
    reader = DocumentReader(tokenizer, data.text_field)
    digest = hashlib.sha256(json.dumps([data.text_field, identity(tokenizer)]).encode())
    for documents in splits.values():
        digest.update("\0".join(["", *documents.values()]).encode())
    work = {name: partial(reader.read, documents) for name, documents in splits.items()}
    return write_packed(cache_dir(data), digest.hexdigest()[:32], work)


def _try_out(model: nn.Module, samples: PackedDocuments, length: int) -> Way:
    """Return how documents pass through the model; tried on the GPU where there is one."""
    if any(parameter.is_meta for parameter in model.parameters()):
        return NOT_TRIED  # a dry run, which has no weights
    here = next(model.parameters()).device
    tokens = samples.batch(torch.arange(min(len(samples), 8)))[0].flatten()
    if torch.cuda.is_available():
        model.to("cuda")
    try:
        return find_way(model, tokens, length)
    finally:
        model.to(here)
