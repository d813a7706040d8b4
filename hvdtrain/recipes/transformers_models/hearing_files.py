"""The files beside a model that hears: its tokenizer of characters, and how a wave is made ready for it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from hvdtrain.errors import DataError
from hvdtrain.recipes.transformers_models.loading import check_files, import_transformers, why, why_not

_PAD, _UNKNOWN, _SPACE = "<pad>", "<unk>", "|"


def find_tokenizer(source: str, trust_remote_code: bool, is_needed: bool) -> Any:
    """Return the tokenizer of a directory or a name on the hub; None if there is none and none is needed.

    Raises:
        DataError: there is none, or none for CTC.
    """
    check_files(source)
    try:
        tokenizer = import_transformers().AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a tokenizer's files make its code raise
        if not is_needed:
            return None
        raise DataError(f"no tokenizer comes from {source} ({why_not(source, error)})") from error
    if tokenizer.pad_token_id is None:
        raise DataError(f"the tokenizer of {source} has no padding token, which is CTC's blank: it is none for CTC")
    return tokenizer


def make_tokenizer(texts: Iterable[str]) -> Any:
    """Return a tokenizer of the characters of these texts; a space is learned as `|`."""
    characters = sorted(set().union(*texts) - {" ", _SPACE})
    vocabulary = {token: number for number, token in enumerate((_PAD, _UNKNOWN, _SPACE, *characters))}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocab.json"
        path.write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
        return import_transformers().Wav2Vec2CTCTokenizer(
            str(path), pad_token=_PAD, unk_token=_UNKNOWN, word_delimiter_token=_SPACE, bos_token=None, eos_token=None
        )


def check_reads_back(tokenizer: Any, texts: Sequence[str]) -> None:
    """Raise DataError where a tokenizer does not undo what CTC says: repeated tokens, and blanks between them.

    Args:
        tokenizer: whose padding token is the blank.
        texts: some of the data.
    """
    tried = [(text, list(tokenizer(text)["input_ids"])) for text in texts]
    tried = [(text, tokens) for text, tokens in tried if tokens and tokenizer.unk_token_id not in tokens]
    blank = tokenizer.pad_token_id
    for text, tokens in tried:
        said = [part for token in tokens for part in (token, token, blank)]
        if _bare(tokenizer.decode(said)) == _bare(text):
            return
    if tried:
        raise DataError(
            "the tokenizer does not read back what CTC says, in which tokens are repeated and blanks stand between"
            " them: it is none for CTC. Give --data.tokenizer one that is; a new model needs none"
        )


def _bare(text: str) -> str:
    return "".join(text.split()).lower()


def find_extractor(source: str | None) -> Any:
    """Return what makes waves ready, that of a model's directory or name if it has one: its rate, and normalisation."""
    library = import_transformers()
    if source is not None:
        try:
            return library.AutoFeatureExtractor.from_pretrained(source)
        except Exception as error:  # whatever its file makes the library raise
            if (Path(source) / "preprocessor_config.json").exists():
                raise DataError(
                    f"{source} has a preprocessor_config.json that cannot be used ({why(error)})"
                ) from error
    return library.Wav2Vec2FeatureExtractor(
        feature_size=1, sampling_rate=16_000, padding_value=0.0, do_normalize=True, return_attention_mask=True
    )


def write_hearing_files(folder: Path, model: nn.Module, tokenizer: Any, extractor: Any) -> None:
    """Write all that `from_pretrained` of a model and its processor needs besides the weights."""
    saved: Any = model
    saved.config.save_pretrained(folder)
    import_transformers().Wav2Vec2Processor(feature_extractor=extractor, tokenizer=tokenizer).save_pretrained(folder)
