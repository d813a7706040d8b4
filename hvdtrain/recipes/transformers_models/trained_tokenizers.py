"""Tokenizers that are trained on the data at hand, in transformers' form."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hvdtrain.recipes.transformers_models.loading import import_transformers

_PAD, _END, _UNKNOWN, _BEGIN = "<pad>", "</s>", "<unk>", "<s>"


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> Any:
    """Return a byte-level BPE (arXiv:1508.07909) of at most `vocab_size` tokens, which ends a text with `</s>`.

    Digits are kept apart, so that a number is read digit by digit.
    """
    import tokenizers as library

    inner = library.Tokenizer(library.models.BPE(unk_token=None))
    pre = library.pre_tokenizers
    inner.pre_tokenizer = pre.Sequence([pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)])
    inner.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_PAD, _END, _UNKNOWN, _BEGIN],
        initial_alphabet=sorted(pre.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    inner.post_processor = library.processors.TemplateProcessing(
        single=f"$A {_END}", pair=f"$A $B {_END}", special_tokens=[(_END, inner.token_to_id(_END))]
    )
    return import_transformers().PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=_PAD, eos_token=_END, unk_token=_UNKNOWN, bos_token=_BEGIN
    )
