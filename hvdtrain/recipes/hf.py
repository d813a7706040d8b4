"""Any causal language model of transformers, trained from scratch or fine-tuned, on text or conversations.

    horovodrun -np 4 python -m hvdtrain train hf --model.path DIR_OR_NAME --data.path chats.jsonl
    horovodrun -np 4 python -m hvdtrain train hf --model.config config.json --data.tokenizer DIR --data.path text/

Documents are packed to full length, and no document sees another one. `python -m hvdtrain export RUN_DIR` writes what
`from_pretrained` loads.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hvdtrain.data.config import CorpusConfig, cache_dir
from hvdtrain.data.text.chat import DocumentReader, check_template
from hvdtrain.data.text.packed import PackedDocuments, same_document, write_packed
from hvdtrain.data.text.splits import find_splits
from hvdtrain.data.torchvision_import import import_torchvision
from hvdtrain.errors import ConfigError, DataError
from hvdtrain.models.interchange import indexed_files
from hvdtrain.models.linear import product_of
from hvdtrain.models.loss import chunked_loss, next_token_loss
from hvdtrain.optim.adamw import AdamWConfig
from hvdtrain.recipes.choices import LanguageEvalConfig, choice_evaluation
from hvdtrain.settings import CheckpointConfig, ModelConfig, TrainConfig, setting
from hvdtrain.settings.untrusted import read_json
from hvdtrain.trainer import Evaluation, Recipe, Task

_LOSS_BYTES = 2**28
_LOADING_ERRORS = (OSError, ValueError, KeyError, ImportError)
# Models that have one of these do more with the last layer than multiply: their logits are taken as they are.
_LOGIT_SETTINGS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "output_multiplier_scale")


@dataclass(frozen=True, kw_only=True)
class TransformersConfig(ModelConfig):
    """Which model of transformers."""

    path: str | None = setting(None, path="directory or name")
    """Directory or name on the hub of a model to begin with, and of its tokenizer."""
    config: Path | None = setting(None, path="file")
    """config.json of a model to train from scratch; its tokenizer is beside it, or --data.tokenizer."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """How transformers computes attention."""
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
        """Tokenise the documents, once per host, and load or make the model."""
        library = _import_transformers()
        if (self.model.path is None) == (self.model.config is None):
            raise ConfigError("give --model.path, a model to begin with, or --model.config, one to train from scratch")
        tokenizer = self._tokenizer(library)
        folder = self._prepare(tokenizer, say)
        length = self.data.sequence_length
        train, held_out = (PackedDocuments(folder, name, length) for name in ("train", "val"))
        for name, samples in (("training", train), ("held-out", held_out)):
            if len(samples) == 0:
                raise DataError(f"the {name} documents have nothing to predict: use more, or give --data.val-path")
        model = self._model(library, tokenizer)
        return Task(
            model=model,
            train_data=train,
            val_data=held_out,
            loss_sums=_loss,
            evaluations=self._questions(tokenizer, length),
            unit="tokens",
            summarize=lambda means: {**means, "perplexity": math.exp(min(means["loss"], 700.0))},
            write_model_files=lambda folder: _write_model_files(folder, model, tokenizer),
            description=(
                f"data:       {self.data.path or 'Python standard library'}: {train.num_tokens:,} tokens to predict in"
                f" {len(train):,} samples, {held_out.num_tokens:,} held out, vocabulary {len(tokenizer):,}"
            ),
            fingerprint=f"{folder.name} {length}",
        )

    def _questions(self, tokenizer: Any, length: int) -> tuple[Evaluation, ...]:
        if self.eval.choices is None:
            return ()
        begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        return choice_evaluation(
            self.eval.choices,
            lambda text: tokenizer(text, add_special_tokens=False)["input_ids"],
            begin,
            length,
            lambda model, tokens: model(input_ids=tokens, use_cache=False).logits,
        )

    def _tokenizer(self, library: Any) -> Any:
        assert self.model.path is not None or self.model.config is not None
        source = self.data.tokenizer or self.model.path or str(Path(self.model.config or "").parent)
        _check_files(source)
        try:
            tokenizer = library.AutoTokenizer.from_pretrained(source, trust_remote_code=self.model.trust_remote_code)
        except _LOADING_ERRORS as error:
            raise DataError(f"no tokenizer comes from {source} ({_why(error)}): give --data.tokenizer") from error
        check_template(tokenizer.chat_template, source)
        return tokenizer

    def _model(self, library: Any, tokenizer: Any) -> nn.Module:
        how = {"attn_implementation": self.model.attention, "trust_remote_code": self.model.trust_remote_code}
        try:
            if self.model.path is not None:
                _check_files(self.model.path)
                model = library.AutoModelForCausalLM.from_pretrained(self.model.path, dtype=torch.float32, **how)
            else:
                trust = {"trust_remote_code": self.model.trust_remote_code}
                config = library.AutoConfig.from_pretrained(self.model.config, **trust)
                torch.manual_seed(self.train.seed)
                model = library.AutoModelForCausalLM.from_config(config, dtype=torch.float32, **how)
        except _LOADING_ERRORS as error:
            source = self.model.path or str(self.model.config)
            raise DataError(f"no model comes from {source} ({_why(error)})") from error
        model.config.use_cache = False
        if len(tokenizer) > model.config.vocab_size:
            raise DataError(
                f"the tokenizer has {len(tokenizer)} tokens, the model {model.config.vocab_size}: give --data.tokenizer"
                " the one that the model was made for"
            )
        longest = getattr(model.config, "max_position_embeddings", None)
        if longest is not None and self.data.sequence_length > longest:
            raise ConfigError(
                f"--data.sequence-length {self.data.sequence_length} is more than the {longest} positions of the model"
            )
        trained: nn.Module = model.train()
        return trained

    def _prepare(self, tokenizer: Any, say: Callable[[str], None]) -> Path:
        splits = dict(zip(("train", "val"), find_splits(self.data, say), strict=True))
        if self.data.text_field != "text" and not any(
            d.path.suffix == ".jsonl" for part in splits.values() for d in part
        ):
            raise ConfigError(f"--data.text-field has no effect: no file of {self.data.path} is a .jsonl file")
        reader = DocumentReader(tokenizer, self.data.text_field)
        digest = hashlib.sha256(json.dumps([self.data.text_field, _identity(tokenizer)]).encode())
        for documents in splits.values():
            digest.update("\0".join(["", *documents.values()]).encode())
        work = {name: partial(reader.read, documents) for name, documents in splits.items()}
        return write_packed(cache_dir(self.data), digest.hexdigest()[:32], work, {})


def hf() -> Transformers:
    """Return settings for fine-tuning; --model.path says what."""
    return Transformers(
        train=TrainConfig(epochs=1, global_batch_size=16),
        optim=AdamWConfig(peak_lr=2e-5, weight_decay=0.01),
        eval=LanguageEvalConfig(every=200),
        checkpoint=CheckpointConfig(every=200),
        data=DocumentsConfig(sequence_length=512),
    )


def _loss(model: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Return the summed cross entropy; of large vocabularies the logits never exist all at once."""
    tokens, targets, documents, positions = batch
    whole: Any = model
    dtype = next(model.parameters()).dtype
    # Added to the attention's scores; what transformers makes of it is the same for all its models.
    mask = torch.zeros(1, dtype=dtype, device=tokens.device).where(same_document(documents), torch.finfo(dtype).min)
    inputs = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions, "use_cache": False}
    head = whole.get_output_embeddings()
    is_plain = isinstance(head, nn.Linear) and head.bias is None
    is_plain = is_plain and not any(getattr(whole.config, name, None) for name in _LOGIT_SETTINGS)
    chunk = max(1, _LOSS_BYTES // (4 * whole.config.vocab_size))
    if is_plain and targets.numel() > chunk:
        hidden = whole.base_model(**inputs)[0]
        return {"loss": chunked_loss(hidden, head.weight, targets, chunk, product_of(head))}
    return {"loss": next_token_loss(whole(**inputs).logits, targets)[0]}


def _write_model_files(folder: Path, model: nn.Module, tokenizer: Any) -> None:
    saved: Any = model
    config = copy.deepcopy(saved.config)
    config.use_cache = True  # off while it trains
    config.save_pretrained(folder)
    if saved.can_generate():
        saved.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _identity(tokenizer: Any) -> list[Any]:
    """Return what makes two tokenizers the same."""
    inner = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = inner.to_str() if inner is not None else sorted(tokenizer.get_vocab().items())
    return [vocabulary, tokenizer.chat_template, tokenizer.bos_token_id, tokenizer.eos_token_id]


def _import_transformers() -> Any:
    with contextlib.suppress(DataError):
        import_torchvision()  # transformers imports it where it is installed, broken or not
    try:
        import transformers
    except ImportError as error:
        raise DataError(f"the recipe hf needs transformers ({error}): pip install 'hvdtrain[hf]'") from error
    library: Any = transformers
    library.utils.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()
    return library


def _check_files(source: str) -> None:
    """Raise DataError where a directory's files are not what they should be; a name on the hub is left to its library.

    transformers opens whatever an index names, wherever that lies, and waits for ever at a pipe.
    """
    folder = Path(source)
    if not folder.is_dir():
        return
    if (folder / "model.safetensors.index.json").exists():
        indexed_files(folder)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).exists():
            read_json(folder / name)
    for path in folder.iterdir():
        if not path.is_dir() and not path.is_file():
            raise DataError(f"{path} is a pipe, a device or a link to nothing: take it out of the model's directory")


def _why(error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return "it comes with Python code of its own: read it, and run it with --model.trust-remote-code"
    return _first_line(error)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
