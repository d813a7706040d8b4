"""Any causal language model of transformers, trained from scratch or fine-tuned, on text or conversations.

    horovodrun -np 4 python -m hvdtrain train hf --model.path DIR_OR_NAME --data.path chats.jsonl
    horovodrun -np 4 python -m hvdtrain train hf --model.config config.json --data.tokenizer DIR --data.path text/

Documents are packed to full length, and no document sees another one. `python -m hvdtrain export RUN_DIR` writes what
`from_pretrained` loads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from hvdtrain.data.config import CorpusConfig
from hvdtrain.errors import ConfigError
from hvdtrain.optim.adamw import AdamWConfig
from hvdtrain.recipes.choices import LanguageEvalConfig
from hvdtrain.settings import CheckpointConfig, ModelConfig, TrainConfig, setting
from hvdtrain.trainer.task import Recipe, Task


@dataclass(frozen=True, kw_only=True)
class TransformersConfig(ModelConfig):
    """Which model of transformers."""

    path: str | None = setting(None, path="directory or name")
    """Directory or name on the hub of a model to begin with, and of its tokenizer."""
    config: Path | None = setting(None, path="file")
    """config.json of a model to train from scratch; its tokenizer is beside it, or --data.tokenizer."""
    attention: Literal["auto", "sdpa", "eager"] = "auto"
    """How transformers computes attention. auto: sdpa, or eager for models that have nothing else."""
    resize_embeddings: bool = False
    """Give tokens of the tokenizer that the model has no embedding for a new one, the mean of the old."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model or its tokenizer. Read it first: it may do whatever you may do."""


@dataclass(frozen=True, kw_only=True)
class DocumentsConfig(CorpusConfig):
    """Documents to train on: text files, and .jsonl files of texts or conversations."""

    path: str | None = setting(None, path="data")
    """Text file, .jsonl file, directory or glob. None: the source code of the running Python's standard library."""
    val_path: str | None = setting(None, path="data")
    """Held-out files. None: part of --data.path, split by file."""
    tokenizer: str | None = setting(None, path="directory or name")
    """Directory or name of a tokenizer of transformers. None: that of the model."""
    text_field: str = "text"
    """Field of a line of a .jsonl file that holds a text; lines with "messages" are conversations."""


@dataclass(frozen=True, kw_only=True)
class Transformers(Recipe):
    """A causal language model of transformers."""

    model: TransformersConfig = field(default_factory=TransformersConfig)
    data: DocumentsConfig = field(default_factory=DocumentsConfig)
    eval: LanguageEvalConfig = field(default_factory=LanguageEvalConfig)

    def build(self, say: Callable[[str], None]) -> Task:
        """Tokenise the documents, once per host, load or make the model, and try how documents pass through it."""
        if (self.model.path is None) == (self.model.config is None):
            raise ConfigError("give --model.path, a model to begin with, or --model.config, one to train from scratch")

        from hvdtrain.recipes.hf_task import build_task

        return build_task(self, say)


def hf() -> Transformers:
    """Return settings for fine-tuning; --model.path says what."""
    return Transformers(
        train=TrainConfig(epochs=1, global_batch_size=16),
        optim=AdamWConfig(peak_lr=2e-5, weight_decay=0.01),
        eval=LanguageEvalConfig(every=200),
        checkpoint=CheckpointConfig(every=200),
        data=DocumentsConfig(sequence_length=512),
    )
