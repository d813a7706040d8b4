"""Translations by a trained encoder-decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hvdtrain.errors import DataError
from hvdtrain.recipes.transformers_models.auto_classes import load_trained
from hvdtrain.recipes.transformers_models.encoder_decoders import translate
from hvdtrain.recipes.transformers_models.loading import load_tokenizer
from hvdtrain.recipes.transformers_models.probe import describe
from hvdtrain.rundir.trained import Trained
from hvdtrain.settings.untrusted import read_json

_SHOWN = 40
"""Characters of a text that a message names."""


class Translator:
    """Translates texts, each as training has shown them.

    Args:
        trained: the weights, and the files that say what they are.

    Raises:
        DataError: model or tokenizer cannot be loaded.
    """

    def __init__(self, trained: Trained) -> None:
        self._tokenizer = load_tokenizer(str(trained.folder))
        self._model = load_trained(trained, "AutoModelForSeq2SeqLM")
        self._prefix = str(read_json(trained.folder / "config.json").get("prefix") or "")

    def translate(self, texts: Sequence[str], beams: int, longest: int) -> list[str]:
        """Return a translation of each text.

        Args:
            texts: in any number; they pass through the model together.
            beams: of the search; 1 takes the likeliest token each time.
            longest: the most tokens of a translation.

        Raises:
            DataError: a text is longer than what the model was made for.
        """
        given = self._tokenizer([f"{self._prefix}{text}" for text in texts], padding=True, return_tensors="pt")
        device = next(self._model.parameters()).device
        settings: Any = self._model.config
        most = getattr(settings, "max_position_embeddings", None)
        if most is not None and given["input_ids"].shape[1] > most:
            count = given["input_ids"].shape[1]
            begins = texts[int(given["attention_mask"].sum(1).argmax())][:_SHOWN]
            raise DataError(f"a text has {count:,} tokens, and the model {most:,} positions: it begins {begins!r}")
        tokens, is_text = given["input_ids"].to(device), given["attention_mask"].to(device)
        try:
            return translate(self._model, self._tokenizer, tokens, is_text, beams, longest)
        except (IndexError, RuntimeError) as error:  # not all models say how many positions they have
            count = given["input_ids"].shape[1]
            raise DataError(f"the model fails at a text of {count:,} tokens ({describe(error)})") from error
