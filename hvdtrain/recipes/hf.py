"""Any causal language model of transformers, trained from scratch or fine-tuned, on text or conversations.

    horovodrun -np 4 python -m hvdtrain train hf --model.path DIR_OR_NAME --data.path chats.jsonl
    horovodrun -np 4 python -m hvdtrain train hf --model.config config.json --data.tokenizer DIR --data.path text/
    horovodrun -np 4 python -m hvdtrain train hf --model.path DIR_OR_NAME --data.path chats.jsonl --model.lora-rank 16

Documents are packed to full length, and no document sees another one. `python -m hvdtrain export RUN_DIR` writes what
`from_pretrained` loads. With `--model.lora-rank` adapters alone are trained (arXiv:2106.09685): those of a tiny Llama,
of rank 8, go from a held-out loss of 0.12179 to 0.09019 in 40 steps, 2 seconds of processor time (AMD EPYC), where all
weights come to 0.10249 (benchmarks/results/adapters.txt).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from hvdtrain.data.config import CorpusConfig
from hvdtrain.errors import ConfigError
from hvdtrain.optim.adamw import AdamWConfig
from hvdtrain.recipes.choices import LanguageEvalConfig
from hvdtrain.recipes.origin import check_one_origin
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
    lora_rank: int | None = setting(None, above=0, maximum=2**16)
    """Train adapters of this rank beside frozen weights (LoRA, by the peft library). None: all weights are trained."""
    lora_alpha: float | None = setting(None, above=0)
    """What an adapter adds is multiplied by alpha / rank. None: twice the rank."""
    lora_dropout: float = setting(0.0, minimum=0, below=1)
    """Share of an adapter's inputs that is dropped in training."""
    lora_targets: tuple[str, ...] = ()
    """Names of the layers that get an adapter, such as q_proj v_proj. None given: every linear layer but the output."""
    resize_embeddings: bool = False
    """Give tokens of the tokenizer that the model has no embedding for a new one, the mean of the old."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model or its tokenizer. Read it first: it may do whatever you may do."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora_rank is None:
            return
        if self.path is None and self.config is not None:
            raise ConfigError(
                "--model.lora-rank needs --model.path: adapters are trained beside weights that are there"
            )
        if self.resize_embeddings:
            raise ConfigError(
                "--model.resize-embeddings and --model.lora-rank do not go together: beside adapters nothing is learned"
                " for new rows"
            )

    def unused(self) -> Iterator[tuple[str, str]]:
        """Yield the shape of adapters where there are none."""
        yield from super().unused()
        if self.lora_rank is None:
            for name in ("lora_alpha", "lora_dropout", "lora_targets"):
                yield name, "it is of adapters, which --model.lora-rank asks for"


@dataclass(frozen=True, kw_only=True)
class DocumentsConfig(CorpusConfig):
    """Documents to train on: texts, and records of texts or conversations."""

    path: str | None = setting(None, path="data")
    """File, directory or glob: texts, or records as .jsonl, .ndjson, .json, .csv (also .gz, .bz2, .xz and .zst),
    .parquet and .arrow; what `save_to_disk` of datasets writes. None: the source code of the running Python's standard
    library."""
    val_path: str | None = setting(None, path="data")
    """Held-out files. None: the validation (else test) split, where the names of files or directories in --data.path
    say which are train, validation and test; else part of it, of texts by file, of records one by one, by a hash."""
    tokenizer: str | None = setting(None, path="directory or name")
    """Directory or name of a tokenizer of transformers. None: that of the model."""
    chat_template: Path | None = setting(None, path="file")
    """File of a chat template (Jinja), instead of the tokenizer's own; it is exported with the tokenizer."""
    text_field: str = "text"
    """Field of a record that holds a text. Conversations are known by theirs: messages; conversations (ShareGPT);
    prompt and completion; instruction and output (Alpaca); the only one that holds a list of messages. A list of
    messages is one, too."""
    on_error: Literal["stop", "skip"] = "stop"
    """What to do at a record that cannot be used: stop, or leave it out and say how many there were."""
    show: int = setting(0, minimum=0, changeable=True)
    """Print the first so many samples of training as tokens, what is learned in brackets."""


@dataclass(frozen=True, kw_only=True)
class ChatEvalConfig(LanguageEvalConfig):
    """Evaluation on the held-out data, and of questions, as texts or as conversations."""

    chat: bool = setting(False, changeable=True)
    """Ask --eval.choices by the chat template: a context is a user's message, or a list of messages; choices are what
    the assistant may answer."""

    def unused(self) -> Iterator[tuple[str, str]]:
        """Yield the way of asking where nothing is asked."""
        yield from super().unused()
        if self.choices is None:
            yield "chat", "it says how --eval.choices are asked"


@dataclass(frozen=True, kw_only=True)
class Transformers(Recipe):
    """A causal language model of transformers."""

    model: TransformersConfig = field(default_factory=TransformersConfig)
    data: DocumentsConfig = field(default_factory=DocumentsConfig)
    eval: ChatEvalConfig = field(default_factory=ChatEvalConfig)

    def build(self, say: Callable[[str], None]) -> Task:
        """Tokenise the documents, once per host, load or make the model, and try how documents pass through it."""
        check_one_origin(self.model.path, self.model.config, is_needed=True)

        from hvdtrain.recipes.hf_task import build_task

        return build_task(self, say)


def hf() -> Transformers:
    """Return settings for fine-tuning; --model.path says what."""
    return Transformers(
        train=TrainConfig(epochs=1, global_batch_size=16),
        optim=AdamWConfig(peak_lr=2e-5, weight_decay=0.01),
        eval=ChatEvalConfig(every=200),
        checkpoint=CheckpointConfig(every=200),
        data=DocumentsConfig(sequence_length=512),
    )
