"""Any encoder-decoder of transformers (T5, BART, Marian and others): translation, summaries, corrections.

    horovodrun -np 4 python -m hvdtrain train seq2seq --model.path DIR_OR_NAME --data.path pairs.tsv
    horovodrun -np 2 python -m hvdtrain train seq2seq        numbers in digits to words, English and German

Pairs come from tables (TSV), JSON lines and Parquet. Batches hold samples of about one length; held-out sources are
translated by transformers' own beam search on all ranks, and scored by sacrebleu. `generate RUN_DIR --file FILE`
translates. On two cores (AMD EPYC, AVX2) the numbers take 1m50s, to a held-out BLEU of 99.88
(benchmarks/results/translation_speech.txt).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from hvdtrain.errors import ConfigError
from hvdtrain.optim.adamw import AdamWConfig
from hvdtrain.recipes.origin import check_one_origin
from hvdtrain.settings import CheckpointConfig, DataConfig, EvalConfig, ModelConfig, Section, TrainConfig, setting
from hvdtrain.trainer.task import Recipe, Task

# Tokens of a BPE that is trained.
_OF_NUMBERS, _OF_TEXT = 400, 8000


@dataclass(frozen=True, kw_only=True)
class EncoderDecoderConfig(ModelConfig):
    """Which encoder-decoder of transformers."""

    path: str | None = setting(None, path="directory or name")
    """Directory or name on the hub of a model to begin with, and of its tokenizer."""
    config: Path | None = setting(None, path="file")
    """config.json of a model to train from scratch. None, and no path: a small BART for two CPU cores."""
    attention: Literal["auto", "sdpa", "eager"] = "auto"
    """How transformers computes attention. auto: as it chooses itself."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model or its tokenizer. Read it first: it may do whatever you may do."""


@dataclass(frozen=True, kw_only=True)
class PairsConfig(DataConfig):
    """Pairs of a text and what it shall become."""

    path: str | None = setting(None, path="data")
    """File, directory or glob: tables of columns between tabs, or records as .jsonl, .csv, .parquet or .arrow. None:
    numbers in digits, and in English and German words."""
    val_path: str | None = setting(None, path="data")
    """Held-out pairs. None: the validation (else test) split that the names of files say, else a part by a hash."""
    val_fraction: float = setting(0.05, above=0, below=1)
    """Share of the sources that is held out, with all their targets."""
    source_field: str | None = None
    """Field of a record, or column of a table: its number from 1, or its name in the first line. None: by its usual
    names, such as source, else the first column."""
    target_field: str | None = None
    """Likewise of targets. None: by its usual names, such as target, else the second column."""
    source_prefix: str = ""
    """Text before every source, such as T5's "translate English to German: "."""
    source_language: str | None = None
    """Code of the language of the sources, for tokenizers that must be told, as those of NLLB and mBART: eng_Latn,
    en_XX. None: the one with which the tokenizer was saved, where its two differ."""
    target_language: str | None = None
    """Likewise of the targets; translations begin with its token."""
    tokenizer: str | None = setting(None, path="directory or name")
    """Directory or name of a tokenizer of transformers. None: that of --model.path; without one, a byte-level BPE is
    trained on the training pairs, which keeps digits apart."""
    vocab_size: int | None = setting(None, minimum=300, maximum=2**31)
    """The most tokens of a BPE that is trained. None: 8000; for numbers 400."""
    max_source_length: int = setting(256, above=0, maximum=2**20)
    """Tokens of the longest source; pairs that are longer are left out, and counted."""
    max_target_length: int = setting(256, above=0, maximum=2**20)
    """Tokens of the longest target, likewise; translations end there, too."""
    on_error: Literal["stop", "skip"] = "stop"
    """What to do at a line that cannot be used, such as one with one column: stop, or leave it out and say how many
    there were."""
    cache_dir: str | None = setting(None, path="new directory")
    """Where prepared tokens are kept. None: hvdtrain/tokens in the user's cache directory."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.source_field is not None and self.source_field == self.target_field:
            raise ConfigError(f"--data.source-field and --data.target-field are both {self.source_field!r}")

    @property
    def num_tokens(self) -> int:
        """Return what `vocab_size` comes to."""
        return self.vocab_size or (_OF_NUMBERS if self.path is None else _OF_TEXT)

    def unused(self) -> Iterator[tuple[str, str]]:
        """Yield what says how files are read where there are none, and what is held out where that is given."""
        yield from super().unused()
        if self.path is None:
            for name in ("val_path", "source_field", "target_field", "on_error"):
                yield name, "--data.path names no files: the pairs are made up"
        if self.val_path is not None:
            yield "val_fraction", "--data.val-path says what is held out"


@dataclass(frozen=True, kw_only=True)
class TranslationEvalConfig(EvalConfig):
    """Evaluation on the held-out pairs: their loss, and translations of their sources."""

    samples: int | None = setting(None, minimum=0, changeable=True)
    """How many held-out sources are translated in an evaluation. None: all; 0: none."""
    beams: int = setting(4, above=0, maximum=1024, changeable=True)
    """Of the beam search; 1: the likeliest token each time."""
    bleu_tokenizer: Literal["13a", "intl", "zh", "char", "none"] = setting("13a", changeable=True)
    """How sacrebleu cuts texts into words. zh: for Chinese; char: every character."""

    def unused(self) -> Iterator[tuple[str, str]]:
        """Yield how to translate where nothing is translated."""
        yield from super().unused()
        if self.samples == 0:
            for name in ("beams", "bleu_tokenizer"):
                yield name, "--eval.samples 0 has nothing translated"


@dataclass(frozen=True, kw_only=True)
class TargetsConfig(Section):
    """What the model is asked to say."""

    smoothing: float = setting(0.0, minimum=0, below=1)
    """In training, this share of each target is spread over all tokens (arXiv:1512.00567, section 7)."""


@dataclass(frozen=True, kw_only=True)
class EncoderDecoder(Recipe):
    """An encoder-decoder of transformers."""

    model: EncoderDecoderConfig = field(default_factory=EncoderDecoderConfig)
    data: PairsConfig = field(default_factory=PairsConfig)
    labels: TargetsConfig = field(default_factory=TargetsConfig)
    eval: TranslationEvalConfig = field(default_factory=TranslationEvalConfig)

    def build(self, say: Callable[[str], None]) -> Task:
        """Tokenise the pairs, once per host, and load or make the model."""
        check_one_origin(self.model.path, self.model.config)

        from hvdtrain.recipes.seq2seq_task import build_task

        return build_task(self, say)

    def unused(self) -> Iterator[tuple[str, str]]:
        """Yield the size of a vocabulary that is not made."""
        yield from super().unused()
        if self.data.tokenizer is not None or self.model.path is not None:
            yield "data.vocab_size", "it is for a tokenizer that is trained, and there is one"


def seq2seq() -> EncoderDecoder:
    """Return settings for the small BART on numbers; to fine-tune a large model, --optim.peak-lr 5e-5."""
    return EncoderDecoder(
        train=TrainConfig(steps=600, global_batch_size=32),
        optim=AdamWConfig(peak_lr=2e-3, warmup_fraction=0.1, weight_decay=0.01),
        eval=TranslationEvalConfig(every=300, batch_size=64),
        checkpoint=CheckpointConfig(every=300),
    )
