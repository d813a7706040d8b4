"""The task of `recipes/seq2seq.py`: pairs, the model, and how translations are scored. Needs torch and transformers."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hvdtrain.data.config import cache_at
from hvdtrain.data.text.corpus import Document, find_documents
from hvdtrain.data.text.known import KnownFiles
from hvdtrain.data.text.named_splits import listed, named_splits
from hvdtrain.data.text.number_words import number_pairs
from hvdtrain.data.text.pair_samples import PairWriter, TokenizedPairs, read_held_out
from hvdtrain.data.text.pairs import Pair, PairReader
from hvdtrain.data.text.sealed import sealed_folder
from hvdtrain.data.text.shared import say_shared
from hvdtrain.data.text.sources import held_out_below, position
from hvdtrain.data.text.splits import without_runs
from hvdtrain.errors import DataError, counted
from hvdtrain.recipes.seq2seq import EncoderDecoder, PairsConfig
from hvdtrain.recipes.seq2seq_model import check_longest, check_positions, load_model
from hvdtrain.recipes.sequences import by_length, first_of, shortest, shown, spread
from hvdtrain.recipes.transformers_models.auto_classes import needs
from hvdtrain.recipes.transformers_models.encoder_decoders import PairLoss, translate, try_out
from hvdtrain.recipes.transformers_models.languages import begin_with, tell_languages
from hvdtrain.recipes.transformers_models.loading import (
    identity,
    import_transformers,
    load_tokenizer,
    write_model_files,
)
from hvdtrain.recipes.transformers_models.trained_tokenizers import train_tokenizer
from hvdtrain.settings.files import sha256_of
from hvdtrain.trainer.task import CorpusEvaluation, Task

FORMAT_VERSION = 1


def build_task(recipe: EncoderDecoder, say: Callable[[str], None]) -> Task:
    """Return the task; `say` tells a person what takes long."""
    data = recipe.data
    if recipe.eval.samples != 0:
        needs("sacrebleu", "the score of translations (--eval.samples)", "translation")
    import_transformers()
    splits, digest = _find(data, say)
    tokenizer = _tokenizer(recipe, splits["train"], digest, say)
    empty_target = tell_languages(tokenizer, data.source_language, data.target_language)
    if empty_target:
        digest = _digest([digest, tokenizer.src_lang, tokenizer.tgt_lang])
    folder, about = _prepare(data, tokenizer, splits, digest, say)
    model = load_model(recipe, tokenizer)
    if empty_target:
        begin_with(model, tokenizer, empty_target)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    train, held_out = (TokenizedPairs(folder, name, padding) for name in ("train", "val"))
    for name, split, samples in (("training", "train", train), ("held-out", "val", held_out)):
        if len(samples) == 0:
            too_long = about["too_long"].get(split, 0)
            why = f" ({too_long:,} are longer than --data.max-source-length or --data.max-target-length)"
            raise DataError(
                f"there are no {name} pairs that can be used{why if too_long else ''}: use more, or give"
                " --data.val-path"
            )
        check_positions(model, samples)
    loss, way = PairLoss(recipe.labels.smoothing), ""
    if not any(parameter.is_meta for parameter in model.parameters()):  # a dry run has no weights
        loss, way = try_out(model, train.batch(shortest(train.source_lengths + train.target_lengths)), loss)
        for samples in (train, held_out):
            check_longest(model, samples, loss)
    lines = (
        f"data:       {data.path or 'numbers in digits and in words, English and German'}: {len(train):,} pairs,"
        f" {int(train.target_lengths.sum()):,} tokens to predict, {len(held_out):,} held out,"
        f" vocabulary {len(tokenizer):,}",
        *_describe(about, data),
        way,
    )
    return Task(
        model=model,
        train_data=train,
        val_data=held_out,
        sampler=by_length(train.source_lengths + train.target_lengths, recipe.train),
        loss_sums=loss,
        evaluations=_translations(recipe, folder, held_out, tokenizer),
        unit="tokens",
        summarize=lambda means: {**means, "perplexity": math.exp(min(means["loss"], 700.0))},
        samples=lambda model, metrics: {
            "translations": _show(model, tokenizer, held_out, read_held_out(folder), recipe)
        },
        epilogue=lambda model, metrics: _show(model, tokenizer, held_out, read_held_out(folder), recipe),
        write_model_files=lambda folder: write_model_files(folder, model, tokenizer),
        description="\n".join(filter(None, lines)),
        fingerprint=folder.name,
    )


Splits = Mapping[str, Callable[[PairReader], Iterator[Pair]]]
"""What yields the pairs of train and val."""


def _find(data: PairsConfig, say: Callable[[str], None]) -> tuple[Splits, str]:
    """Return the splits, and a hash of all that makes their pairs."""
    made_by: list[Any] = [data.source_field, data.target_field, data.on_error, data.val_fraction]
    if data.path is None:
        return _by_hash(lambda reader: number_pairs(), data.val_fraction), _digest([*made_by, "numbers"])
    documents = listed(without_runs(find_documents(data.path), data.path, say))
    made_by.append(_digests(data, documents))
    if data.val_path is not None:
        held_out = listed(without_runs(find_documents(data.val_path), data.val_path, say))
        made_by.append(_digests(data, held_out))
        named = named_splits(documents)
        documents = documents if named is None else named.train
        say_shared((item.path for item in documents), (item.path for item in held_out), _cache(data), say)
    elif (named := named_splits(documents)) is not None:
        say(named.about)
        documents, held_out = named.train, named.held_out
    else:
        reader = PairReader(data.source_field, data.target_field, "skip")  # what is wrong is told when all are read
        below = held_out_below((position(source) for source, _ in reader.read(documents)), data.val_fraction)
        return _by_hash(partial(_read, documents), below), _digest(made_by)
    return {"train": partial(_read, documents), "val": partial(_read, held_out)}, _digest(made_by)


def _read(documents: Sequence[Document], reader: PairReader) -> Iterator[Pair]:
    return reader.read(documents)


def _by_hash(whole: Callable[[PairReader], Iterator[Pair]], fraction: float) -> Splits:
    """Return the splits of pairs whose sources are held out by a hash: equal sources are never apart."""

    def part(is_held_out: bool, reader: PairReader) -> Iterator[Pair]:
        # Both parts read all lines: what cannot be used counts once.
        own = replace(reader, num_skipped=0, skipped=[]) if is_held_out else reader
        return (pair for pair in whole(own) if (position(pair[0]) <= fraction) == is_held_out)

    return {"train": partial(part, False), "val": partial(part, True)}


def _digests(data: PairsConfig, documents: Sequence[Document]) -> list[list[str]]:
    """Return name and hash of each file, which is read again only where it has changed."""
    named = {str(document.path.absolute()): document for document in documents}
    known = KnownFiles(_cache(data), f"pairs of {' '.join(named)}")
    hashes = known.values({name: document.path for name, document in named.items()}, lambda name: sha256_of(Path(name)))
    return [[document.name, hashes[name]] for name, document in named.items()]


def _digest(values: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps([FORMAT_VERSION, *values]).encode()).hexdigest()[:32]


def _cache(data: PairsConfig) -> Path:
    return cache_at(data.cache_dir)


def _tokenizer(
    recipe: EncoderDecoder, train: Callable[[PairReader], Iterator[Pair]], digest: str, say: Callable[[str], None]
) -> Any:
    data = recipe.data
    source = data.tokenizer or recipe.model.path
    if source is not None:
        return load_tokenizer(source, recipe.model.trust_remote_code)

    def write(new: Path) -> None:
        reader = PairReader(data.source_field, data.target_field, "skip")  # what is wrong is told when pairs are read
        pairs = ((f"{data.source_prefix}{one}", other) for one, other in train(reader))
        train_tokenizer((text for pair in pairs for text in pair), data.num_tokens).save_pretrained(new)

    name = _digest([digest, data.source_prefix, data.num_tokens])
    return load_tokenizer(str(sealed_folder(_cache(data), f"pairs-bpe-{name}", write, say)))


def _prepare(
    data: PairsConfig, tokenizer: Any, splits: Splits, digest: str, say: Callable[[str], None]
) -> tuple[Path, dict[str, Any]]:
    """Return the folder of the tokenised pairs, and what was counted."""
    longest = (data.max_source_length, data.max_target_length)

    def encode(sources: Sequence[str], targets: Sequence[str]) -> tuple[list[list[int]], list[list[int]]]:
        given = [f"{data.source_prefix}{source}" for source in sources]
        return tokenizer(given)["input_ids"], tokenizer(text_target=list(targets))["input_ids"]

    def write(new: Path) -> None:
        reader = PairReader(data.source_field, data.target_field, data.on_error)
        writer = PairWriter(encode, longest)
        for name, read in splits.items():
            writer.write(new, name, read(reader))
        meta = {"too_long": writer.num_too_long, "num_skipped": reader.num_skipped, "skipped": reader.skipped}
        (new / "meta.json").write_text(json.dumps(meta))

    name = _digest([digest, identity(tokenizer), data.source_prefix, *longest])
    folder = sealed_folder(_cache(data), f"pairs-{name}", write, say)
    return folder, json.loads((folder / "meta.json").read_text())


def _describe(about: dict[str, Any], data: PairsConfig) -> Iterator[str]:
    """Yield what a person should know of pairs that are left out."""
    if about["num_skipped"]:
        yield f"left out:   {counted(about['num_skipped'], 'line')} that cannot be used, such as {about['skipped'][0]}"
    if any(about["too_long"].values()):
        train, held_out = (about["too_long"].get(name, 0) for name in ("train", "val"))
        yield (
            f"left out:   {train:,} training and {held_out:,} held-out pairs with more than {data.max_source_length}"
            f" tokens in the source or {data.max_target_length} in the target"
        )


def _translations(
    recipe: EncoderDecoder, folder: Path, held_out: TokenizedPairs, tokenizer: Any
) -> tuple[CorpusEvaluation, ...]:
    asked, longest = recipe.eval, recipe.data.max_target_length
    data = first_of(held_out, asked.samples)
    if data is None:
        return ()

    def answers(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> list[str]:
        return translate(model, tokenizer, batch[0], batch[1], asked.beams, longest)

    def score(answers: list[str]) -> dict[str, float]:
        library = needs("sacrebleu", "the score of translations", "translation")
        references = [[target for _, target in read_held_out(folder)[: len(data)]]]
        bleu = library.corpus_bleu(answers, references, tokenize=asked.bleu_tokenizer)
        return {"bleu": bleu.score, "chrf": library.corpus_chrf(answers, references).score}

    return (CorpusEvaluation(data=data, answers=answers, score=score, metrics=("bleu", "chrf")),)


def _show(
    model: nn.Module, tokenizer: Any, held_out: TokenizedPairs, pairs: Sequence[Pair], recipe: EncoderDecoder
) -> str:
    """Return a few held-out sources with what the model makes of them."""
    device = next(model.parameters()).device
    chosen = spread(len(pairs))
    sources, is_text, _ = held_out.batch(chosen)
    model.eval()
    made = translate(
        model, tokenizer, sources.to(device), is_text.to(device), recipe.eval.beams, recipe.data.max_target_length
    )
    return shown("held-out sources, and what is made of them:", [pairs[int(i)][0] for i in chosen], made)
