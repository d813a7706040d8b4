"""What the recipe lm trains: the decoder, its text, its loss, and what is read at the end."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hvdtrain.data.config import TextConfig
from hvdtrain.data.dataset import Dataset
from hvdtrain.data.text.known import KnownFiles
from hvdtrain.data.text.packed import same_document
from hvdtrain.data.text.stream import PreparedText, prepare_text
from hvdtrain.data.text.tokenizer import write_tokenizer
from hvdtrain.data.text.windows import DocumentWindows, Shard, TokenWindows, first_tokens
from hvdtrain.errors import DataError, DivergedError, megabytes
from hvdtrain.models.bigrams import begin_at_bigrams
from hvdtrain.models.config import DecoderConfig
from hvdtrain.models.decoder import Decoder
from hvdtrain.models.documents import bounds_of, has_kernel
from hvdtrain.models.interchange import load_decoder, read_shape, to_llama
from hvdtrain.models.linear import product_dtype
from hvdtrain.models.ngram import TrigramModel
from hvdtrain.models.sampling import Sampling, sample
from hvdtrain.recipes.choices import choice_evaluation
from hvdtrain.recipes.lm import LanguageModel
from hvdtrain.trainer.task import Batch, Evaluation, Task

_SAMPLE_TOKENS = 400
# Byte trigrams have seen all there is to see in less: a larger part only costs time.
_TRIGRAM_SYMBOLS = 50_000_000
# The same of pairs of tokens, which each rank counts at its start.
_BIGRAM_TOKENS = 16_000_000


def build_task(recipe: LanguageModel, say: Callable[[str], None]) -> Task:
    """Prepare the text, once per host, and build the decoder for its vocabulary."""
    text = prepare_text(recipe.data, say)
    length = recipe.data.sequence_length
    model = _model(recipe, text)
    bytes_per_token = None if text.num_val_bytes is None else text.num_val_bytes / (text.num_val_tokens - 1)
    return Task(
        model=model,
        train_data=_windows(recipe, text, text.train_shards),
        val_data=_windows(recipe, text, text.val_shards),
        loss_sums=_loss(recipe, text),
        evaluations=_questions(recipe, text, length),
        unit="tokens",
        summarize=lambda means: with_bits_per_byte(means, bytes_per_token),
        samples=lambda model, metrics: _samples(model, text, length),
        epilogue=lambda model, metrics: _epilogue(model, metrics, text, length),
        write_model_files=lambda folder: _write_model_files(folder, model, text, length),
        description="\n".join(filter(None, (_describe(text, recipe.data), _describe_start(text, recipe.model)))),
        fingerprint=f"{text.content_hash} {length}",
    )


def _loss(recipe: LanguageModel, text: PreparedText) -> Callable[[nn.Module, Batch], dict[str, Tensor]]:
    """Return the loss of a batch of tokens and targets."""
    if recipe.data.packing == "stream" or text.tokenizer is None:
        return lambda model, batch: {"loss": model(*batch)}
    eot = text.tokenizer.eot
    shape = recipe.model

    def loss(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        tokens, targets, *starts = batch
        dtype = product_dtype(next(model.parameters()))
        given = tokens.device, dtype, shape.num_heads, shape.kv_heads, shape.head_size
        if starts and has_kernel(*given):
            return {"loss": model(tokens, targets, seen=bounds_of(starts[0], tokens.shape[1]))}
        documents = (tokens == eot).cumsum(1)  # each begins with the token that ended the one before
        return {"loss": model(tokens, targets, seen=same_document(documents))}

    return loss


def _windows(recipe: LanguageModel, text: PreparedText, shards: Sequence[Shard]) -> Dataset:
    """Return the samples; where a GPU may take documents by their bounds, these too."""
    windows = TokenWindows(shards, recipe.data.sequence_length)
    is_cut = recipe.data.packing == "documents" and text.tokenizer is not None and torch.cuda.is_available()
    return DocumentWindows(windows, text.tokenizer.eot) if is_cut and text.tokenizer is not None else windows


def _questions(recipe: LanguageModel, text: PreparedText, length: int) -> tuple[Evaluation, ...]:
    path, tokenizer = recipe.eval.choices, text.tokenizer
    if path is None:
        return ()
    if tokenizer is None:
        raise DataError(f"--eval.choices {path} is text, and what the tokens of a .bin file mean nobody knows")
    return choice_evaluation(path, lambda t: tokenizer.encode(t).tolist(), [tokenizer.eot], length, _logits)


def _model(recipe: LanguageModel, text: PreparedText) -> Decoder:
    folder = recipe.model.init_from
    if folder is None:
        model = Decoder(recipe.model, text.vocab_size, seed=recipe.train.seed)
        if recipe.model.init_embeddings == "bigrams":
            begin_at_bigrams(model, first_tokens(text.train_shards, _BIGRAM_TOKENS), recipe.train.seed)
        return model
    vocab_size = read_shape(folder).vocab_size
    if text.vocab_size > vocab_size:
        raise DataError(
            f"the text has a vocabulary of {text.vocab_size} tokens, and the model in {folder} one of {vocab_size}:"
            " give --data.tokenizer the tokenizer.json that the model was trained with"
        )
    model = Decoder(recipe.model, vocab_size, seed=recipe.train.seed)
    load_decoder(model, folder)
    return model


def _logits(model: nn.Module, tokens: Tensor) -> Tensor:
    logits: Tensor = model(tokens)
    return logits


def with_bits_per_byte(means: dict[str, float], bytes_per_token: float | None) -> dict[str, float]:
    """Add perplexity and bits per byte (nats per token / bytes per token / ln 2), alike for any tokenizer."""
    means = {**means, "perplexity": math.exp(min(means["loss"], 700.0))}
    if bytes_per_token is None:
        return means
    return {**means, "bits_per_byte": means["loss"] / bytes_per_token / math.log(2)}


def _write_model_files(folder: Path, model: Decoder, text: PreparedText, length: int) -> None:
    end_of_text = None if text.tokenizer is None else text.tokenizer.eot
    values = to_llama(model.config, model.vocab_size, length, end_of_text)
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    if text.tokenizer is not None:
        write_tokenizer(text.tokenizer, folder, length)


def _describe(text: PreparedText, data: TextConfig) -> str:
    size = "" if text.num_train_bytes is None else f" from {megabytes(text.num_train_bytes)}"
    source = data.path or "the source code of Python's standard library"
    return (
        f"data:       {source}: {text.num_train_tokens:,} training tokens{size},"
        f" {text.num_val_tokens:,} held out, vocabulary {text.vocab_size:,}"
    )


def _describe_start(text: PreparedText, model: DecoderConfig) -> str:
    if model.init_embeddings == "random":
        return ""
    pairs = min(text.num_train_tokens, _BIGRAM_TOKENS) - 1
    return f"start:      embeddings and output layer predict what {pairs:,} pairs of training tokens do"


def _epilogue(model: nn.Module, metrics: dict[str, float], text: PreparedText, length: int) -> str:
    return "\n".join(filter(None, (compare_with_trigrams(metrics, text), _show_sample(model, text, length))))


def compare_with_trigrams(metrics: dict[str, float], text: PreparedText) -> str:
    """Return the model's held-out bits per byte beside those of a trigram model of the same training text."""
    if text.train_text_path is None or text.val_text_path is None:
        return ""
    train, held_out = (np.memmap(path, np.uint16, "r") for path in (text.train_text_path, text.val_text_path))
    fitted, asked = train[:_TRIGRAM_SYMBOLS], held_out[:_TRIGRAM_SYMBOLS]
    num_bytes = int((asked < 256).sum())  # the others are ends of text
    trigram = _trigram_nats(text, fitted, asked) / num_bytes / math.log(2)
    parts = [
        f"{name} the first {len(part) / 1e6:.0f} of {len(whole) / 1e6:,.0f} MB"
        for name, part, whole in (("fitted to", fitted, train), ("tested on", asked, held_out))
        if len(part) < len(whole)
    ]
    capped = f"  ({', '.join(parts)})" if parts else ""
    return (
        f"held-out text    bits per byte   nats per byte\n"
        f"  this model     {metrics['val/bits_per_byte']:13.3f}   {metrics['val/bits_per_byte'] * math.log(2):13.3f}\n"
        f"  byte trigrams  {trigram:13.3f}   {trigram * math.log(2):13.3f}{capped}"
    )


def _trigram_nats(text: PreparedText, fitted: NDArray[np.uint16], asked: NDArray[np.uint16]) -> float:
    """Return the nats of a text by trigrams of another: counted once per host, they are the same in every run."""
    assert text.train_text_path is not None
    assert text.val_text_path is not None
    files = {"train": text.train_text_path, "held out": text.val_text_path}
    counted = functools.cache(lambda: TrigramModel.fit(fitted).nats(asked))
    known = KnownFiles(text.val_text_path.parents[1], f"trigrams {text.content_hash} {len(fitted)} {len(asked)}")
    one, other = known.values(files, lambda name: counted()).values()
    return float(one) if one == other else counted()  # one of the files was changed since


def _samples(model: nn.Module, text: PreparedText, length: int) -> dict[str, str]:
    written = written_sample(model, text, length)
    return {"text": written} if written else {}


def _show_sample(model: nn.Module, text: PreparedText, length: int) -> str:
    if text.tokenizer is None:
        return ""
    rule = "-" * 72
    return f"a sample of what it writes:\n{rule}\n{written_sample(model, text, length).strip()}\n{rule}"


def written_sample(model: nn.Module, text: PreparedText, length: int) -> str:
    """Return what the model writes from the beginning of a document; "" where nobody knows what tokens mean.

    A model that is broken writes why: it has been trained all the same.
    """
    if text.tokenizer is None:
        return ""
    assert isinstance(model, Decoder)
    how = Sampling(temperature=0.7, seed=0)
    most = min(_SAMPLE_TOKENS, 4 * length)
    try:
        drawn = [*sample(model, [[text.tokenizer.eot]], most, context_length=length, sampling=how)]
    except DivergedError as error:
        return f"(nothing: {error})"
    tokens = [token for (token,) in drawn if token is not None]
    return text.tokenizer.decode([token for token in tokens if token != text.tokenizer.eot])
