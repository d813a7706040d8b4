"""Language model: the native decoder on text; by default on the source code of Python's standard library.

    horovodrun -np 2 python -m hvdtrain                      two CPU cores: one minute, 1.7 bits per byte
    horovodrun -np 8 python -m hvdtrain train lm-124m --data.path 'corpus/*.txt' --train.precision bf16

`lm` and `lm-10m` are made for CPU cores; `lm-124m` (the size of GPT-2 small), `lm-1b` and `lm-3b` are for GPUs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from hvdtrain.data.config import TextConfig
from hvdtrain.errors import ConfigError
from hvdtrain.models.config import SHAPE, DecoderConfig
from hvdtrain.optim.adamw import AdamWConfig
from hvdtrain.recipes.choices import LanguageEvalConfig
from hvdtrain.settings import CheckpointConfig, LogConfig, TrainConfig
from hvdtrain.trainer.task import Recipe, Task


@dataclass(frozen=True, kw_only=True)
class StreamConfig(TextConfig):
    """Text to train on, as one stream that is cut into samples."""

    packing: Literal["stream", "documents"] = "stream"
    """What a token sees of the documents before its own in a sample. stream: all of them, which is the fastest, and
    what GPT-2 and nanoGPT do; documents: nothing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.packing == "documents" and self.is_tokens:
            raise ConfigError(
                f"packing = documents needs text: nothing in {self.path} says which token begins a document"
            )


@dataclass(frozen=True, kw_only=True)
class LanguageModel(Recipe):
    """A decoder that predicts the next token of text."""

    model: DecoderConfig = field(default_factory=DecoderConfig)
    data: StreamConfig = field(default_factory=StreamConfig)
    eval: LanguageEvalConfig = field(default_factory=LanguageEvalConfig)

    def unused(self) -> Iterator[tuple[str, str]]:
        """Yield the type of the residual stream where all products are of that type anyway."""
        yield from super().unused()
        precision = self.train.precision
        if self.model.residual_dtype == "products" and precision not in ("auto", "bf16", "fp16"):
            yield "model.residual_dtype", f"with --train.precision {precision} there is one type alone"

    def build(self, say: Callable[[str], None]) -> Task:
        """Prepare the text, once per host, and build the decoder for its vocabulary."""
        from hvdtrain.recipes.lm_task import build_task

        return build_task(self, say)

    def resolve(self) -> LanguageModel:
        """Take the shape of the model, and its tokenizer, from `--model.init-from`."""
        folder = self.model.init_from
        if folder is None:
            return self

        from hvdtrain.data.text.tokenizer import BYTE_VOCAB_SIZE
        from hvdtrain.models.interchange import read_shape

        shape = read_shape(folder)
        given = {name: getattr(shape.config, name) for name in SHAPE}
        given["init_embeddings"] = "random"  # replaced by its own
        data, tokenizer = self.data, folder / "tokenizer.json"
        if tokenizer.exists() and (data.tokenizer == "bpe" or shape.vocab_size != BYTE_VOCAB_SIZE):
            data = dataclasses.replace(data, tokenizer=str(tokenizer))
        return dataclasses.replace(self, model=dataclasses.replace(self.model, **given), data=data)


def lm() -> LanguageModel:
    """Return the default: a small byte-level model for two CPU cores."""
    return LanguageModel(
        train=TrainConfig(steps=1000, global_batch_size=16),
        optim=AdamWConfig(peak_lr=5e-3, warmup_fraction=0.05),
        log=LogConfig(every=20),
        eval=LanguageEvalConfig(every=250),
        checkpoint=CheckpointConfig(every=250),
        model=DecoderConfig(
            num_layers=3, hidden_size=128, num_heads=4, tie_embeddings=False, init_embeddings="bigrams"
        ),
        data=StreamConfig(sequence_length=128, val_fraction=0.01),
    )


def lm_10m() -> LanguageModel:
    """Return ten million parameters on a byte-level BPE of 4,096 tokens, 8,192 tokens a step, for CPU cores.

    Ten minutes on two of them reach 1.49 bits per byte.
    """
    return LanguageModel(
        train=TrainConfig(steps=300, global_batch_size=32),
        optim=AdamWConfig(peak_lr=3e-3, warmup_fraction=1 / 6),
        log=LogConfig(every=10),
        eval=LanguageEvalConfig(every=100),
        checkpoint=CheckpointConfig(every=100),
        model=DecoderConfig(
            num_layers=7, hidden_size=320, num_heads=5, tie_embeddings=False, init_embeddings="bigrams"
        ),
        data=StreamConfig(tokenizer="bpe", vocab_size=4096, sequence_length=256, val_fraction=0.01),
    )


def lm_124m() -> LanguageModel:
    """Return the size of GPT-2 small, on a byte-level BPE of 50,304 tokens, 0.5M tokens a step."""
    return LanguageModel(
        train=TrainConfig(steps=20_000, global_batch_size=512, precision="bf16"),
        optim=AdamWConfig(peak_lr=6e-4, warmup_fraction=0.035),
        eval=LanguageEvalConfig(every=1000),
        checkpoint=CheckpointConfig(every=1000),
        model=DecoderConfig(num_layers=12, hidden_size=768, num_heads=12, compile="auto"),
        data=StreamConfig(tokenizer="bpe", vocab_size=50_304, sequence_length=1024),
    )


def lm_1b() -> LanguageModel:
    """Return a model of about a billion parameters with grouped-query attention, 1M tokens a step."""
    return LanguageModel(
        train=TrainConfig(steps=50_000, global_batch_size=512, precision="bf16"),
        optim=AdamWConfig(peak_lr=3e-4, warmup_fraction=0.04),
        eval=LanguageEvalConfig(every=1000),
        checkpoint=CheckpointConfig(every=1000),
        model=DecoderConfig(
            num_layers=16, hidden_size=2048, num_heads=32, num_kv_heads=8, intermediate_size=8192, compile="auto"
        ),
        data=StreamConfig(tokenizer="bpe", vocab_size=50_304, sequence_length=2048),
    )


def lm_3b() -> LanguageModel:
    """Return three billion parameters, 1M tokens a step; a GPU of 80 GB holds weights, gradients and optimizer."""
    return LanguageModel(
        train=TrainConfig(steps=100_000, global_batch_size=512, precision="bf16"),
        optim=AdamWConfig(peak_lr=2e-4, warmup_fraction=0.02),
        eval=LanguageEvalConfig(every=1000),
        checkpoint=CheckpointConfig(every=1000),
        model=DecoderConfig(
            num_layers=28,
            hidden_size=3072,
            num_heads=24,
            num_kv_heads=8,
            intermediate_size=8192,
            checkpoint_blocks=True,
            compile="auto",
        ),
        data=StreamConfig(tokenizer="bpe", vocab_size=50_304, sequence_length=2048),
    )
