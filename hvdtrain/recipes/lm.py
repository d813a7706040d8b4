"""Language model: the native decoder on text; by default on the source code of Python's standard library.

    horovodrun -np 2 python -m hvdtrain                      two CPU cores: one minute, 1.9 bits per byte
    horovodrun -np 8 python -m hvdtrain train lm-124m --data.path 'corpus/*.txt' --train.precision bf16

`lm` and `lm-10m` are made for CPU cores; `lm-124m` (the size of GPT-2 small), `lm-1b` and `lm-3b` are for GPUs.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from torch import Tensor, nn

from hvdtrain.data.text.packed import same_document
from hvdtrain.data.text.settings import TextConfig
from hvdtrain.data.text.stream import PreparedText, prepare_text
from hvdtrain.data.text.tokenizer import BYTE_VOCAB_SIZE, write_tokenizer
from hvdtrain.data.text.windows import TokenWindows
from hvdtrain.errors import ConfigError, DataError
from hvdtrain.models.decoder import Decoder, DecoderConfig
from hvdtrain.models.interchange import load_decoder, read_shape, to_llama
from hvdtrain.models.ngram import TrigramModel
from hvdtrain.models.sampling import Sampling, sample
from hvdtrain.recipes.choices import choice_evaluation
from hvdtrain.settings import CheckpointConfig, EvalConfig, LogConfig, OptimConfig, TrainConfig
from hvdtrain.trainer import Evaluation, Recipe, Task
from hvdtrain.trainer.task import Batch

_SAMPLE_TOKENS = 400
# Byte trigrams have seen all there is to see in less: a larger part only costs time.
_TRIGRAM_SYMBOLS = 50_000_000


@dataclass(frozen=True, kw_only=True)
class StreamConfig(TextConfig):
    """Text to train on, as one stream that is cut into samples."""

    packing: Literal["stream", "documents"] = "stream"
    """What a token sees of the documents before its own in a sample. stream: all of them, which is the fastest, and
    what GPT-2 and nanoGPT do; documents: nothing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.packing == "documents" and (self.path or "").endswith(".bin"):
            raise ConfigError(
                f"packing = documents needs text: nothing in {self.path} says which token begins a document"
            )


@dataclass(frozen=True, kw_only=True)
class LanguageModel(Recipe):
    """A decoder that predicts the next token of text."""

    model: DecoderConfig = field(default_factory=DecoderConfig)
    data: StreamConfig = field(default_factory=StreamConfig)

    def build(self, say: Callable[[str], None]) -> Task:
        """Prepare the text, once per host, and build the decoder for its vocabulary."""
        text = prepare_text(self.data, say)
        length = self.data.sequence_length
        model = self._model(text)
        bytes_per_token = None if text.num_val_bytes is None else text.num_val_bytes / (text.num_val_tokens - 1)
        return Task(
            model=model,
            train_data=TokenWindows(text.train_path, text.dtype, length),
            val_data=TokenWindows(text.val_path, text.dtype, length),
            loss_sums=self._loss(text),
            evaluations=self._questions(text, length),
            unit="tokens",
            summarize=lambda means: _with_bits_per_byte(means, bytes_per_token),
            epilogue=lambda model, metrics: _epilogue(model, metrics, text, length),
            write_model_files=lambda folder: _write_model_files(folder, model, text, length),
            description=_describe(text, self.data),
            fingerprint=f"{text.content_hash} {length}",
        )

    def resolve(self) -> LanguageModel:
        """Take the shape of the model, and its tokenizer, from `--model.init-from`."""
        folder = self.model.init_from
        if folder is None:
            return self
        shape = read_shape(folder).config
        given = {name: getattr(shape, name) for name in _SHAPE}
        data, tokenizer = self.data, folder / "tokenizer.json"
        if tokenizer.exists() and (data.tokenizer == "bpe" or read_shape(folder).vocab_size != BYTE_VOCAB_SIZE):
            data = dataclasses.replace(data, tokenizer=str(tokenizer))
        return dataclasses.replace(self, model=dataclasses.replace(self.model, **given), data=data)

    def _loss(self, text: PreparedText) -> Callable[[nn.Module, Batch], dict[str, Tensor]]:
        """Return the loss of a batch of tokens and targets."""
        if self.data.packing == "stream" or text.tokenizer is None:
            return lambda model, batch: {"loss": model(*batch)}
        eot = text.tokenizer.eot

        def loss(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
            tokens, targets = batch
            documents = (tokens == eot).cumsum(1)  # each begins with the token that ended the one before
            return {"loss": model(tokens, targets, seen=same_document(documents))}

        return loss

    def _questions(self, text: PreparedText, length: int) -> tuple[Evaluation, ...]:
        path, tokenizer = self.eval.choices, text.tokenizer
        if path is None:
            return ()
        if tokenizer is None:
            raise DataError(f"--eval.choices {path} is text, and what the tokens of a .bin file mean nobody knows")
        return choice_evaluation(path, lambda t: tokenizer.encode(t).tolist(), [tokenizer.eot], length, _logits)

    def _model(self, text: PreparedText) -> Decoder:
        folder = self.model.init_from
        if folder is None:
            return Decoder(self.model, text.vocab_size, seed=self.train.seed)
        vocab_size = read_shape(folder).vocab_size
        if text.vocab_size > vocab_size:
            raise DataError(
                f"the text has a vocabulary of {text.vocab_size} tokens, and the model in {folder} one of {vocab_size}:"
                " give --data.tokenizer the tokenizer.json that the model was trained with"
            )
        model = Decoder(self.model, vocab_size, seed=self.train.seed)
        load_decoder(model, folder)
        return model


_SHAPE = (
    *("num_layers", "hidden_size", "num_heads", "num_kv_heads", "intermediate_size", "rope_theta", "norm_eps"),
    "tie_embeddings",
)


def lm() -> LanguageModel:
    """Return the default: a small byte-level model for two CPU cores."""
    return LanguageModel(
        train=TrainConfig(steps=1000, global_batch_size=16),
        optim=OptimConfig(peak_lr=5e-3, warmup_steps=50),
        log=LogConfig(every=20),
        eval=EvalConfig(every=250),
        checkpoint=CheckpointConfig(every=250),
        model=DecoderConfig(num_layers=3, hidden_size=128, num_heads=4),
        data=StreamConfig(sequence_length=128, val_fraction=0.01),
    )


def lm_10m() -> LanguageModel:
    """Return ten million parameters on a byte-level BPE of 4,096 tokens, 8,192 tokens a step, for CPU cores.

    Ten minutes on two of them reach 1.49 bits per byte.
    """
    return LanguageModel(
        train=TrainConfig(steps=300, global_batch_size=32),
        optim=OptimConfig(peak_lr=3e-3, warmup_steps=50),
        log=LogConfig(every=10),
        eval=EvalConfig(every=100),
        checkpoint=CheckpointConfig(every=100),
        model=DecoderConfig(num_layers=7, hidden_size=320, num_heads=5),
        data=StreamConfig(tokenizer="bpe", vocab_size=4096, sequence_length=256, val_fraction=0.01),
    )


def lm_124m() -> LanguageModel:
    """Return the size of GPT-2 small, on a byte-level BPE of 50,304 tokens, 0.5M tokens a step."""
    return LanguageModel(
        train=TrainConfig(steps=20_000, global_batch_size=512, precision="bf16"),
        optim=OptimConfig(peak_lr=6e-4, warmup_steps=700),
        eval=EvalConfig(every=1000),
        checkpoint=CheckpointConfig(every=1000),
        model=DecoderConfig(num_layers=12, hidden_size=768, num_heads=12),
        data=StreamConfig(tokenizer="bpe", vocab_size=50_304, sequence_length=1024),
    )


def lm_1b() -> LanguageModel:
    """Return a model of about a billion parameters with grouped-query attention, 1M tokens a step."""
    return LanguageModel(
        train=TrainConfig(steps=50_000, global_batch_size=512, precision="bf16"),
        optim=OptimConfig(peak_lr=3e-4, warmup_steps=2000),
        eval=EvalConfig(every=1000),
        checkpoint=CheckpointConfig(every=1000),
        model=DecoderConfig(num_layers=16, hidden_size=2048, num_heads=32, num_kv_heads=8, intermediate_size=8192),
        data=StreamConfig(tokenizer="bpe", vocab_size=50_304, sequence_length=2048),
    )


def lm_3b() -> LanguageModel:
    """Return three billion parameters, 1M tokens a step; a GPU of 80 GB holds weights, gradients and optimizer."""
    return LanguageModel(
        train=TrainConfig(steps=100_000, global_batch_size=512, precision="bf16"),
        optim=OptimConfig(peak_lr=2e-4, warmup_steps=2000),
        eval=EvalConfig(every=1000),
        checkpoint=CheckpointConfig(every=1000),
        model=DecoderConfig(
            num_layers=28,
            hidden_size=3072,
            num_heads=24,
            num_kv_heads=8,
            intermediate_size=8192,
            checkpoint_blocks=True,
        ),
        data=StreamConfig(tokenizer="bpe", vocab_size=50_304, sequence_length=2048),
    )


def _logits(model: nn.Module, tokens: Tensor) -> Tensor:
    logits: Tensor = model(tokens)
    return logits


def _with_bits_per_byte(means: dict[str, float], bytes_per_token: float | None) -> dict[str, float]:
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
    size = "" if text.num_train_bytes is None else f" from {text.num_train_bytes / 1e6:.1f} MB"
    source = data.path or "the source code of Python's standard library"
    return (
        f"data:       {source}: {text.num_train_tokens:,} training tokens{size},"
        f" {text.num_val_tokens:,} held out, vocabulary {text.vocab_size:,}"
    )


def _epilogue(model: nn.Module, metrics: dict[str, float], text: PreparedText, length: int) -> str:
    return "\n".join(filter(None, (_compare(metrics, text), _show_sample(model, text, length))))


def _compare(metrics: dict[str, float], text: PreparedText) -> str:
    """Return the model's held-out bits per byte beside those of a trigram model of the same training text."""
    if text.train_text_path is None or text.val_text_path is None:
        return ""
    train, held_out = (np.memmap(path, np.uint16, "r") for path in (text.train_text_path, text.val_text_path))
    fitted, asked = train[:_TRIGRAM_SYMBOLS], held_out[:_TRIGRAM_SYMBOLS]
    num_bytes = int((asked < 256).sum())  # the others are ends of text
    trigram = TrigramModel.fit(fitted).nats(asked) / num_bytes / math.log(2)
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


def _show_sample(model: nn.Module, text: PreparedText, length: int) -> str:
    if text.tokenizer is None:
        return ""
    assert isinstance(model, Decoder)
    how = Sampling(temperature=0.7, seed=0)
    drawn = sample(model, [[text.tokenizer.eot]], min(_SAMPLE_TOKENS, 4 * length), context_length=length, sampling=how)
    tokens = [token for (token,) in drawn if token is not None]
    shown = text.tokenizer.decode([token for token in tokens if token != text.tokenizer.eot])
    rule = "-" * 72
    return f"a sample of what it writes:\n{rule}\n{shown.strip()}\n{rule}"
