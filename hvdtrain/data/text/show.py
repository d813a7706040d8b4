"""Samples as a person can read them: tokens, and which of them are learned."""

from __future__ import annotations

from typing import Any

import torch

from hvdtrain.data.text.packed import PackedDocuments
from hvdtrain.data.text.windows import IGNORED


def show_samples(samples: PackedDocuments, tokenizer: Any, number: int) -> str:
    """Return the first samples, each document by itself: tokens apart, those that are learned in brackets.

    Args:
        samples: of training.
        tokenizer: of transformers.
        number: how many.
    """
    lines = []
    for index in range(min(number, len(samples))):
        batch = samples.batch(torch.tensor([index]))
        tokens, targets, documents, _ = (part[0].tolist() for part in batch)
        lines.append(f"sample {index + 1}: {sum(target != IGNORED for target in targets)} tokens are learned, in [ ]")
        for document in dict.fromkeys(documents):
            if document < 0:
                continue
            places = [i for i, owner in enumerate(documents) if owner == document]
            first, last = places[0], places[-1]
            words = [_word(tokenizer, tokens[first], is_learned=False)]
            # Each place shows a token and predicts the next one, which the sample does not hold for the last.
            for i in places:
                token = targets[i] if targets[i] != IGNORED else tokens[i + 1] if i < last else None
                if token is not None:
                    words.append(_word(tokenizer, token, targets[i] != IGNORED))
            lines.append("  " + "".join(words))
    return "\n".join(lines)


def _word(tokenizer: Any, token: int, is_learned: bool) -> str:
    """Return a token's text, apart from its neighbours."""
    text = tokenizer.decode([token]).encode("unicode_escape").decode()
    return f"[{text}]" if is_learned else f"{text}|"
