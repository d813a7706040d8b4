"""Preferences, learned directly (DPO, arXiv:2305.18290): of two answers the chosen one becomes likelier.

    horovodrun -np 4 python -m hvdtrain train dpo --model.path DIR_OR_NAME --data.path pairs.jsonl
    horovodrun -np 4 python -m hvdtrain train dpo --model.path DIR_OR_NAME --data.path pairs.jsonl --model.lora-rank 16

The reference is the model as it is before the first step; its log-probabilities are computed once. With adapters
(`--model.lora-rank`) that is the base model. A tiny Llama has learned which of two styles is preferred after 40 steps
of 16 pairs, 6 seconds of processor time (AMD EPYC): of all held-out pairs the chosen answer has the larger reward, with
adapters as with all weights (benchmarks/results/adapters.txt).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from hvdtrain.data.config import CorpusConfig
from hvdtrain.errors import ConfigError
from hvdtrain.optim.adamw import AdamWConfig
from hvdtrain.recipes.hf import TransformersConfig
from hvdtrain.settings import CheckpointConfig, EvalConfig, Section, TrainConfig, setting
from hvdtrain.trainer.task import Recipe, Task


@dataclass(frozen=True, kw_only=True)
class PairsConfig(CorpusConfig):
    """Preferences to train on."""

    path: str | None = setting(None, path="data")
    """File, directory or glob of records with the fields prompt, chosen and rejected, texts or lists of messages:
    .jsonl, .ndjson, .json, .csv (also .gz, .bz2, .xz and .zst), .parquet and .arrow."""
    val_path: str | None = setting(None, path="data")
    """Held-out files. None: the validation (else test) split, where the names of files or directories in --data.path
    say which are train, validation and test; else part of the records, by a hash."""
    sequence_length: int = setting(512, above=0, maximum=2**24)
    """Tokens of a prompt and its answer; what is longer is cut at its end."""
    val_fraction: float = setting(0.05, above=0, below=1)
    """Share of the records that is held out."""
    tokenizer: str | None = setting(None, path="directory or name")
    """Directory or name of a tokenizer of transformers. None: that of the model."""
    chat_template: Path | None = setting(None, path="file")
    """File of a chat template (Jinja), instead of the tokenizer's own; it is exported with the tokenizer."""
    on_error: Literal["stop", "skip"] = "stop"
    """What to do at a record that cannot be used: stop, or leave it out and say how many there were."""


@dataclass(frozen=True, kw_only=True)
class DpoConfig(Section):
    """The loss."""

    beta: float = setting(0.1, above=0)
    """How much a log-probability that differs from the reference's counts: the larger, the closer the model stays."""
    label_smoothing: float = setting(0.0, minimum=0, below=0.5)
    """Share of the pairs that are taken to be labelled the wrong way round (conservative DPO)."""


@dataclass(frozen=True, kw_only=True)
class Preferences(Recipe):
    """A causal language model of transformers that learns preferences."""

    model: TransformersConfig = field(default_factory=TransformersConfig)
    data: PairsConfig = field(default_factory=PairsConfig)
    dpo: DpoConfig = field(default_factory=DpoConfig)

    def build(self, say: Callable[[str], None]) -> Task:
        """Tokenise the pairs, once per host, load the model, and try it out."""
        if self.model.path is None:
            raise ConfigError("give --model.path: preferences are learned by a model that can already answer")
        if self.model.config is not None:
            raise ConfigError("--model.config has no effect: the model is that of --model.path")
        if self.data.path is None:
            raise ConfigError("give --data.path: records with the fields prompt, chosen and rejected")

        from hvdtrain.recipes.dpo_task import build_task

        return build_task(self, say)


def dpo() -> Preferences:
    """Return settings for all weights; with adapters, a rate of about ten times as much is usual."""
    return Preferences(
        train=TrainConfig(epochs=1, global_batch_size=32),
        optim=AdamWConfig(peak_lr=1e-6, weight_decay=0.0, warmup_fraction=0.1),
        eval=EvalConfig(every=100),
        checkpoint=CheckpointConfig(every=100),
    )
