"""Which languages a tokenizer and a model translate between, where they must be told: NLLB, mBART and their kin.

Their tokenizers put a token of the language before or behind each text. What a translation begins with is what targets
begin with in training, which is found out by looking, since families differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from hvdtrain.errors import ConfigError
from hvdtrain.recipes.transformers_models.encoder_decoders import before_targets
from hvdtrain.settings.values import nearest

_SOURCE, _TARGET = "--data.source-language", "--data.target-language"


def tell_languages(tokenizer: Any, source: str | None, target: str | None) -> Sequence[int]:
    """Tell a tokenizer its languages; returns the tokens of an empty target, none where it knows no languages.

    Args:
        tokenizer: of transformers; what it is told is saved with it.
        source: code of the language of sources. None: that with which the tokenizer was saved.
        target: likewise of targets.

    Raises:
        ConfigError: it knows no languages and is given some, must be told them, or does not know one.
    """
    if not hasattr(type(tokenizer), "src_lang"):
        if source is None and target is None:
            return ()
        flag = _TARGET if source is None else _SOURCE
        raise ConfigError(
            f"{flag} is for tokenizers that know languages, such as those of NLLB and mBART, and this one knows none:"
            " leave it out; what a model is asked to do may stand in --data.source-prefix"
        )
    if source is None and target is None:
        source, target = tokenizer.src_lang, tokenizer.tgt_lang
        if target is None or target == source:  # untold ones are saved with a language of their own choice, twice
            raise ConfigError(
                f"this tokenizer must be told its languages: give {_SOURCE} and {_TARGET}, {_such(tokenizer)}"
            )
    if source is None or target is None:
        given, missing = (_SOURCE, _TARGET) if target is None else (_TARGET, _SOURCE)
        raise ConfigError(f"{given} is given, and {missing} is not: give both, {_such(tokenizer)}")
    _set(tokenizer, "src_lang", source, _SOURCE)
    tokens = _set(tokenizer, "tgt_lang", target, _TARGET)
    tokenizer.init_kwargs.update(src_lang=source, tgt_lang=target)  # what is saved
    return tokens


def _set(tokenizer: Any, name: str, code: str, flag: str) -> Sequence[int]:
    """Give a tokenizer one of its languages; returns the tokens of an empty text in it."""
    try:
        setattr(tokenizer, name, code)
        tokens = tokenizer(**{"text" if name == "src_lang" else "text_target": ""})["input_ids"]
        is_known = len(_marks(tokenizer, tokens)) == 1 and tokenizer.unk_token_id not in tokens
    except (KeyError, ValueError, TypeError, AttributeError):
        is_known = False
    if not is_known:
        raise ConfigError(f"{flag} {code} is no language of this tokenizer{nearest(code, _codes(tokenizer))}")
    return tuple(tokens)


def _marks(tokenizer: Any, tokens: Sequence[int]) -> list[int]:
    return [token for token in tokens if token != tokenizer.eos_token_id]


def _codes(tokenizer: Any) -> list[str]:
    known: Iterable[Any] = getattr(tokenizer, "lang_code_to_id", None) or tokenizer.all_special_tokens
    others = {str(getattr(tokenizer, name, None)) for name in tokenizer.SPECIAL_TOKENS_ATTRIBUTES}
    return [code for code in map(str, known) if code not in others]


def _such(tokenizer: Any) -> str:
    codes = _codes(tokenizer)
    return f"codes such as {' and '.join(codes[:2])}" if codes else "by the codes that the model's page names"


def begin_with(model: nn.Module, tokenizer: Any, empty_target: Sequence[int]) -> None:
    """Let translations begin as targets do in training.

    Args:
        model: of transformers; its generation_config is changed.
        tokenizer: the one that has been told its languages.
        empty_target: as `tell_languages` returns it.
    """
    whole: Any = model
    (begin,) = before_targets(model, torch.tensor([empty_target]))[:, 0].tolist()
    (mark,) = _marks(tokenizer, empty_target)
    settings = whole.generation_config
    settings.decoder_start_token_id = begin
    settings.forced_bos_token_id = mark if empty_target[0] == mark else None
