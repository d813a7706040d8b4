"""Speech recognition by CTC: Wav2Vec2, HuBERT and other models of transformers that hear waves (arXiv:2006.11477).

    horovodrun -np 4 python -m hvdtrain train ctc --model.path DIR_OR_NAME --data.path clips/
    horovodrun -np 4 python -m hvdtrain train ctc --model.path DIR_OR_NAME --data.path clips.tsv

Clips are WAV, FLAC and what else soundfile reads, their texts beside them or in a table. Batches hold clips of about
one length; held-out clips are written down by all ranks, and scored by jiwer. `predict RUN_DIR FILES...` writes speech
down. Digits spoken by espeak-ng (benchmarks/spoken_words.py) take 2m23s on two ranks of a core each (AMD EPYC), to a
word error rate of 0.016, and 2m25s on one, to 0.013 (benchmarks/results/translation_speech.txt).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from hvdtrain.errors import ConfigError
from hvdtrain.optim.adamw import AdamWConfig
from hvdtrain.recipes.origin import check_one_origin
from hvdtrain.settings import CheckpointConfig, DataConfig, EvalConfig, ModelConfig, TrainConfig, setting
from hvdtrain.trainer.task import Recipe, Task


@dataclass(frozen=True, kw_only=True)
class HearingConfig(ModelConfig):
    """Which model of transformers hears."""

    path: str | None = setting(None, path="directory or name")
    """Directory or name on the hub of a model to begin with; where it has no letters, the layer that says them is
    new."""
    config: Path | None = setting(None, path="file")
    """config.json of a model to train from scratch. None, and no path: a small Wav2Vec2 for two CPU cores."""
    freeze_features: Literal["auto", "yes", "no"] = "auto"
    """Leave the convolutions over the wave as they are. auto: where they were trained, in a model of --model.path."""
    spec_augment: bool = False
    """Mask parts of the input in training, as the model's configuration says (arXiv:1904.08779). transformers draws
    what is masked for a micro-batch: it is another one on another number of ranks."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Read it first: it may do whatever you may do."""


@dataclass(frozen=True, kw_only=True)
class ClipsConfig(DataConfig):
    """Clips of speech and what is said in them."""

    path: str | None = setting(None, path="data")
    """Directory or glob of clips, the text of clip.wav in clip.txt beside it, or of many in NAME.trans.txt; or a table
    of clips and texts (.tsv, .csv, .jsonl, .parquet), whose paths begin where it lies."""
    val_path: str | None = setting(None, path="data")
    """Held-out clips. None: the validation (else test) split that the names of files say, else a part by a hash."""
    val_fraction: float = setting(0.1, above=0, below=1)
    """Share of the clips that is held out."""
    audio_field: str | None = None
    """Field of a record, or column of a table, that holds the path of a clip. None: by its usual names, such as audio,
    else the first column."""
    text_field: str | None = None
    """Likewise of texts. None: by its usual names, such as text, else the second column."""
    lowercase: bool = True
    """Learn small letters only; capitals only where a tokenizer has no others."""
    tokenizer: str | None = setting(None, path="directory or name")
    """Directory or name of a tokenizer of transformers for CTC. None: that of --model.path, else the characters of the
    training texts."""
    max_seconds: float = setting(30.0, above=0, maximum=3600)
    """Clips that are longer are left out, and counted."""
    on_error: Literal["stop", "skip"] = "stop"
    """A clip that cannot be read, or is too short for its text, ends the run; or it is left out, counted and named."""
    cache_dir: str | None = setting(None, path="new directory")
    """Where the lengths of clips are kept. None: hvdtrain/tokens in the user's cache directory."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.audio_field is not None and self.audio_field == self.text_field:
            raise ConfigError(f"--data.audio-field and --data.text-field are both {self.text_field!r}")

    def unused(self) -> Iterator[tuple[str, str]]:
        """Yield what is held out where that is given."""
        yield from super().unused()
        if self.val_path is not None:
            yield "val_fraction", "--data.val-path says what is held out"


@dataclass(frozen=True, kw_only=True)
class HearingEvalConfig(EvalConfig):
    """Evaluation on the held-out clips: their loss, and how many words and characters are wrong."""

    samples: int | None = setting(None, minimum=0, changeable=True)
    """How many held-out clips are written down in an evaluation. None: all; 0: none."""


@dataclass(frozen=True, kw_only=True)
class SpeechRecognition(Recipe):
    """A model of transformers that writes speech down, by CTC."""

    model: HearingConfig = field(default_factory=HearingConfig)
    data: ClipsConfig = field(default_factory=ClipsConfig)
    eval: HearingEvalConfig = field(default_factory=HearingEvalConfig)

    def build(self, say: Callable[[str], None]) -> Task:
        """Find the clips, look at their lengths once per host, and load or make the model."""
        if self.data.path is None:
            raise ConfigError("give --data.path, a directory of clips of speech with their texts, or a table of them")
        check_one_origin(self.model.path, self.model.config)

        from hvdtrain.recipes.ctc_task import build_task

        return build_task(self, say)


def ctc() -> SpeechRecognition:
    """Return settings for the small model on short clips; to fine-tune a large one, --optim.peak-lr 1e-4."""
    return SpeechRecognition(
        train=TrainConfig(steps=1200, global_batch_size=8),
        optim=AdamWConfig(peak_lr=3e-3, warmup_fraction=0.1, weight_decay=0.01),
        eval=HearingEvalConfig(every=200),
        checkpoint=CheckpointConfig(every=200),
    )
