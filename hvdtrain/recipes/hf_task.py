"""The task of `recipes/hf.py`: documents, the model and how they pass through it. Needs torch and transformers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hvdtrain.data.config import cache_dir
from hvdtrain.data.text.chat import ChatTemplate, check_template
from hvdtrain.data.text.documents import DocumentReader
from hvdtrain.data.text.packed import DocumentsWithStarts, PackedDocuments, read_meta, write_packed
from hvdtrain.data.text.show import show_samples
from hvdtrain.data.text.sources import find_sources
from hvdtrain.errors import ConfigError, DataError, counted
from hvdtrain.recipes.choices import choice_evaluation
from hvdtrain.recipes.dpo import PairsConfig
from hvdtrain.recipes.hf import DocumentsConfig, Transformers, TransformersConfig
from hvdtrain.recipes.lm_task import with_bits_per_byte
from hvdtrain.recipes.transformers_models.bounds import ByBounds, by_bounds
from hvdtrain.recipes.transformers_models.forward import run
from hvdtrain.recipes.transformers_models.layouts import BY_MASKS, BY_POSITIONS, Layout
from hvdtrain.recipes.transformers_models.loading import (
    attention_of,
    check_length,
    fit_embeddings,
    identity,
    load_model,
    load_tokenizer,
    write_model_files,
)
from hvdtrain.recipes.transformers_models.lora import (
    Adapters,
    Base,
    BaseWeights,
    adapter_layers,
    add_adapters,
    write_adapter_files,
)
from hvdtrain.recipes.transformers_models.probe import NOT_TRIED, Way, find_way
from hvdtrain.settings import Precision
from hvdtrain.trainer.peaks import product_type
from hvdtrain.trainer.task import Evaluation, Task


def build_task(recipe: Transformers, say: Callable[[str], None]) -> Task:
    """Return the task; `say` tells a person what takes long."""
    data, settings = recipe.data, recipe.model
    tokenizer = tokenizer_of(recipe.data, recipe.model)
    folder = _prepare(data, tokenizer, say)
    length = data.sequence_length
    train, held_out = (PackedDocuments(folder, name, length) for name in ("train", "val"))
    for name, samples in (("training", train), ("held-out", held_out)):
        if len(samples) == 0:
            raise DataError(f"the {name} documents have nothing to predict: {_why_none(samples, length)}")
    if data.show:
        say(show_samples(train, tokenizer, data.show))
    model = load_model(
        settings.path, settings.config, settings.attention, recipe.train.seed, settings.trust_remote_code
    )
    meta = read_meta(folder)
    embeddings = fit_embeddings(model, len(tokenizer), meta["largest_token"], settings.resize_embeddings)
    check_length(model, length)
    base = adapted(model, recipe.model, recipe.train.seed)
    ways = _ways(recipe.train.precision)
    way = try_out(model, train.batch(torch.arange(min(len(train), 8)))[0], length, ways)
    is_cut = isinstance(way.loss.layout, ByBounds)
    lines = (
        f"data:       {data.path or 'Python standard library'}: {train.num_tokens:,} tokens to predict in"
        f" {len(train):,} samples, {held_out.num_tokens:,} held out, vocabulary {len(tokenizer):,}",
        *_describe_records(meta, train.num_cut + held_out.num_cut, train.num_lost + held_out.num_lost, length),
        f"documents:  {way}",
        embeddings,
        describe_adapters(recipe.model, model),
        ""
        if way.loss.head
        else "logits:     of a whole micro-batch at once, since this model's head cannot be given a part",
        "" if is_cut or attention_of(model) == "sdpa" else f"attention:  {attention_of(model)}",
    )
    bytes_per_token = held_out.num_bytes / held_out.num_tokens
    return Task(
        model=model,
        train_data=DocumentsWithStarts(train) if is_cut else train,
        val_data=DocumentsWithStarts(held_out) if is_cut else held_out,
        loss_sums=way.loss,
        metrics=("loss",) if way.loss.balance is None else ("loss", "balance_loss"),
        evaluations=_questions(recipe, tokenizer, length),
        unit="tokens",
        summarize=lambda means: with_bits_per_byte(means, bytes_per_token),
        write_model_files=lambda folder: write_files(folder, model, tokenizer, base),
        components=() if base is None else (lambda job: BaseWeights(base),),
        description="\n".join(filter(None, lines)),
        fingerprint=f"{folder.name} {length}",
    )


def adapted(model: nn.Module, settings: TransformersConfig, seed: int) -> Base | None:
    """Put adapters into the model, in place, if the settings ask for them; returns what its own weights are known by.

    Raises:
        ConfigError: they do not fit the model.
        DataError: peft is not installed.
    """
    if settings.lora_rank is None or settings.path is None:
        return None
    alpha = 2.0 * settings.lora_rank if settings.lora_alpha is None else settings.lora_alpha
    adapters = Adapters(settings.lora_rank, alpha, settings.lora_dropout, settings.lora_targets)
    return add_adapters(model, adapters, settings.path, seed)


def describe_adapters(settings: TransformersConfig, model: nn.Module) -> str:
    """Return what a person should know of the adapters; nothing where there are none."""
    if settings.lora_rank is None:
        return ""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    whole = sum(parameter.numel() for parameter in model.parameters()) - trained
    return (
        f"lora:       adapters of rank {settings.lora_rank} on {len(adapter_layers(model))} layers: {trained:,} numbers"
        f" are trained, sent and saved, {100 * trained / whole:.3g} % of the base model's {whole:,}, which stay as they"
        " are"
    )


def write_files(folder: Path, model: nn.Module, tokenizer: Any, base: Base | None) -> None:
    """Write what a reader of the weights needs beside them; of adapters also what they belong to."""
    write_model_files(folder, model, tokenizer)
    if base is not None:
        write_adapter_files(folder, model, base)


def _why_none(samples: PackedDocuments, length: int) -> str:
    """Return why there is nothing to predict, and what to do."""
    if samples.num_lost:
        return (
            f"what is learned of {counted(samples.num_lost, 'conversation')} comes behind the {length} tokens of a"
            " sample: give a larger --data.sequence-length"
        )
    if samples.num_documents:
        return f"nothing of {counted(samples.num_documents, 'document')} is learned"
    return "there are none, as where all records are alike; use more, or give --data.val-path"


def _describe_records(meta: dict[str, Any], num_cut: int, num_lost: int, length: int) -> list[str]:
    """Return what a person should know of the records and their formats."""
    formats = {name: f"{count:,} {name}" for name, count in meta["formats"].items()}
    if "text files" in formats:
        formats["text files"] = counted(meta["formats"]["text files"], "text file")
    lines = [f"formats:    {', '.join(formats.values())}"]
    if num_cut:
        lines.append(
            f"cut:        {counted(num_cut, 'conversation')} at the end, longer than a sample of {length} tokens"
        )
    if num_lost:
        lines.append(
            f"left out:   {counted(num_lost, 'conversation')} of which what is learned comes behind {length} tokens: a"
            " larger --data.sequence-length has room for it"
        )
    lines += [f"left out:   {counted(count, name)}" for name, count in meta.get("without", {}).items()]
    if meta["num_skipped"]:
        lines.append(
            f"left out:   {counted(meta['num_skipped'], 'record')} that cannot be used, such as {meta['skipped'][0]}"
        )
    return lines


def tokenizer_of(data: DocumentsConfig | PairsConfig, model: TransformersConfig) -> Any:
    """Return the tokenizer that the settings name, with their chat template.

    Raises:
        ConfigError: the file of the template cannot be read.
        DataError: there is no tokenizer.
    """
    source = data.tokenizer or model.path or str(Path(model.config or "").parent)
    tokenizer = load_tokenizer(source, model.trust_remote_code)
    template = data.chat_template
    if template is not None:
        try:
            tokenizer.chat_template = template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--data.chat-template {template} cannot be read: {error}") from error
        check_template(tokenizer.chat_template, str(template))
    return tokenizer


def _questions(recipe: Transformers, tokenizer: Any, length: int) -> tuple[Evaluation, ...]:
    if recipe.eval.choices is None:
        return ()
    begin: list[int] = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return choice_evaluation(
        recipe.eval.choices,
        lambda text: tokenizer(text, add_special_tokens=False)["input_ids"],
        [] if recipe.eval.chat else begin,  # a template writes what it begins with itself
        length,
        lambda model, tokens: run(model, {"input_ids": tokens}).logits,
        ChatTemplate(tokenizer).question if recipe.eval.chat else str,
    )


def _prepare(data: DocumentsConfig, tokenizer: Any, say: Callable[[str], None]) -> Path:
    """Return the folder of the tokenised documents."""
    splits = find_sources(data, say)
    if data.text_field != "text" and not any(source.kind for part in splits.values() for source in part):
        raise ConfigError(f"--data.text-field has no effect: no file of {data.path} holds records")
    reader = DocumentReader(tokenizer, data.text_field, data.on_error)
    made_by = [data.text_field, data.on_error, identity(tokenizer)]
    digest = hashlib.sha256(json.dumps(made_by).encode())
    for part in splits.values():
        digest.update("\0".join(["", *(f"{source.digest} {source.held_out_below}" for source in part)]).encode())
    work = {name: partial(reader.read, part) for name, part in splits.items()}
    return write_packed(cache_dir(data), digest.hexdigest()[:32], work, reader.describe, say)


def _ways(precision: Precision) -> tuple[Layout, ...]:
    """Return how documents may be packed: by their bounds where a GPU computes attention in 16 bits."""
    dtype = product_type(precision)
    if dtype.itemsize != 2 or not torch.cuda.is_available():
        return BY_POSITIONS, BY_MASKS
    return by_bounds(torch.device("cuda", torch.cuda.current_device()), dtype), BY_POSITIONS, BY_MASKS


def try_out(model: nn.Module, tokens: Tensor, length: int, packed: Sequence[Layout] = (BY_POSITIONS, BY_MASKS)) -> Way:
    """Return how documents pass through the model; tried on the GPU where there is one.

    Args:
        model: of transformers.
        tokens: int64, some of the data's.
        length: T, tokens of a sample.
        packed: ways to be tried before a row for each document.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        return NOT_TRIED  # a dry run, which has no weights
    here = next(model.parameters()).device
    if torch.cuda.is_available():
        model.to("cuda")
    try:
        return find_way(model, tokens.flatten(), length, packed)
    finally:
        model.to(here)
