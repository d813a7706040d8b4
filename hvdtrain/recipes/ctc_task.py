"""The task of `recipes/ctc.py`: clips, the model, and how what it hears is scored. Needs torch and transformers."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hvdtrain.data.clips import Clip, ClipSamples, find_clips, measured
from hvdtrain.data.config import cache_at
from hvdtrain.data.text.corpus import Document
from hvdtrain.data.text.named_splits import named_splits
from hvdtrain.data.text.pair_samples import mixed_by_length
from hvdtrain.data.text.pairs import PairReader
from hvdtrain.data.text.shared import say_shared
from hvdtrain.data.text.sources import held_out_below, position
from hvdtrain.errors import ConfigError, DataError, counted
from hvdtrain.recipes.ctc import ClipsConfig, SpeechRecognition
from hvdtrain.recipes.sequences import by_length, first_of, shortest, shown, spread
from hvdtrain.recipes.transformers_models.auto_classes import load_as, needs
from hvdtrain.recipes.transformers_models.hearing import CtcLoss, small_wav2vec2, try_out, write_down
from hvdtrain.recipes.transformers_models.hearing_files import (
    check_reads_back,
    find_extractor,
    find_tokenizer,
    make_tokenizer,
    write_hearing_files,
)
from hvdtrain.recipes.transformers_models.loading import import_transformers
from hvdtrain.trainer.task import CorpusEvaluation, Task

KIND = "AutoModelForCTC"
_READ_BACK = 16
"""Texts that a tokenizer is tried on."""


def build_task(recipe: SpeechRecognition, say: Callable[[str], None]) -> Task:
    """Return the task; `say` tells a person what takes long."""
    data = recipe.data
    needs("soundfile", "the recipe ctc", "speech")
    if recipe.eval.samples != 0:
        needs("jiwer", "the score of what is heard (--eval.samples)", "speech")
    import_transformers()
    reader = PairReader(data.audio_field, data.text_field, data.on_error, ("--data.audio-field", "--data.text-field"))
    train, held_out = _splits(data, reader, say)
    source = data.tokenizer or recipe.model.path
    trust = recipe.model.trust_remote_code
    tokenizer = find_tokenizer(source, trust, is_needed=data.tokenizer is not None) if source else None
    train, held_out, spelling = _spelled(data, tokenizer, train, held_out)
    tokenizer = tokenizer or make_tokenizer(clip.text for clip in train)
    extractor = find_extractor(recipe.model.path)
    rate = int(extractor.sampling_rate)
    _check_rates([*train, *held_out], rate)
    model = _load(recipe, tokenizer)
    about = _Usable(model, tokenizer, rate, data.max_seconds, reader)
    train_data, val_data = (
        ClipSamples(*about.of(part), rate, extractor.do_normalize, data.on_error == "skip")
        for part in (train, _mixed(held_out))
    )
    for name, samples in (("training", train_data), ("held-out", val_data)):
        if len(samples) == 0:
            left_out = "; ".join(" ".join(line.split()) for line in _left_out(reader, about, data))
            raise DataError(
                f"there are no {name} clips that can be used{f' ({left_out})' if left_out else ''}: use more, or give"
                " --data.val-path"
            )
    metrics = ("loss", "unread") if data.on_error == "skip" else ("loss",)
    loss, way = CtcLoss(tokenizer.pad_token_id, metrics=metrics), ""
    if not any(parameter.is_meta for parameter in model.parameters()):  # a dry run has no weights
        loss, way = try_out(model, train_data.batch(shortest(train_data.lengths)), loss)
    _check_letters(about, tokenizer)
    check_reads_back(tokenizer, [clip.text for clip in train_data.clips[:_READ_BACK]])
    seconds = [samples.lengths.sum() / rate for samples in (train_data, val_data)]
    lines = (
        f"data:       {data.path}: {len(train_data):,} clips of {_hours(seconds[0])}, {len(val_data):,} of"
        f" {_hours(seconds[1])} held out, {len(tokenizer)} tokens",
        *_left_out(reader, about, data),
        spelling,
        way,
    )
    return Task(
        model=model,
        train_data=train_data,
        val_data=val_data,
        sampler=by_length(train_data.lengths, recipe.train),
        loss_sums=loss,
        metrics=metrics,
        evaluations=_transcripts(recipe, val_data, tokenizer, loss),
        unit="characters",
        summarize=_over_those_read,
        samples=lambda model, metrics: {"transcripts": _show(model, tokenizer, val_data, loss)},
        epilogue=lambda model, metrics: _show(model, tokenizer, val_data, loss),
        write_model_files=lambda folder: write_hearing_files(folder, model, tokenizer, extractor),
        description="\n".join(filter(None, lines)),
        fingerprint=_fingerprint(train_data, val_data, tokenizer),
    )


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:,.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"


def _splits(data: ClipsConfig, reader: PairReader, say: Callable[[str], None]) -> tuple[list[Clip], list[Clip]]:
    """Return the training and the held-out clips, measured."""
    assert data.path is not None
    clips = _found(data, data.path, reader)
    documents = [Document(clip.name, clip.path) for clip in clips]
    named = named_splits(documents)
    if data.val_path is not None:
        held_out = _found(data, data.val_path, reader)
        own = None if named is None else {document.path for document in named.train}
        train = [clip for clip in clips if own is None or clip.path in own]
        say_shared((clip.path for clip in train), (clip.path for clip in held_out), cache_at(data.cache_dir), say)
        return train, held_out
    if named is not None:
        say(named.about)
        parts = [{document.path for document in part} for part in (named.train, named.held_out)]
        train, held_out = ([clip for clip in clips if clip.path in part] for part in parts)
        return train, held_out
    places = [position(clip.name) for clip in clips]
    below = held_out_below(places, data.val_fraction)
    train, held_out = (
        [clip for clip, place in zip(clips, places, strict=True) if (place <= below) == which]
        for which in (False, True)
    )
    return train, held_out


def _found(data: ClipsConfig, path: str, reader: PairReader) -> list[Clip]:
    corpus = str(Path(path).expanduser().absolute())
    return measured(find_clips(path, reader), cache_at(data.cache_dir), corpus, reader)


def _spelled(
    data: ClipsConfig, tokenizer: Any, train: Sequence[Clip], held_out: Sequence[Clip]
) -> tuple[list[Clip], list[Clip], str]:
    """Return the clips with texts in letters that a tokenizer has, if there is one, and what a person should know."""
    spell, about = (str.lower if data.lowercase else str), ""
    letters = [token for token in tokenizer.get_vocab() if len(token) == 1] if tokenizer is not None else []
    if data.lowercase and any(map(str.isupper, letters)) and not any(map(str.islower, letters)):
        spell, about = str.upper, "texts:      in capitals, as the tokenizer has no small letters"
    first, second = ([replace(clip, text=spell(clip.text)) for clip in part] for part in (train, held_out))
    return first, second, about


def _mixed(clips: list[Clip]) -> list[Clip]:
    """Return held-out clips so that neighbours are of about one length, and each rank has short and long ones."""
    return [clips[number] for number in mixed_by_length([clip.frames for clip in clips])]


def _check_rates(clips: Sequence[Clip], rate: int) -> None:
    other = next((clip for clip in clips if clip.rate != rate), None)
    if other is not None:
        needs("soxr", f"{other.path} has {other.rate:,} Hz, the model hears {rate:,} Hz, and resampling", "speech")


class _Usable:
    """Chooses the clips that can be learned from."""

    def __init__(self, model: nn.Module, tokenizer: Any, rate: int, max_seconds: float, reader: PairReader) -> None:
        self._model, self._tokenizer, self._rate, self._reader = model, tokenizer, rate, reader
        self._longest = int(max_seconds * rate)
        self.num_too_long = 0
        self.num_unknown = self.num_tokens = 0
        """Characters that the tokenizer does not have, of how many."""

    def of(self, clips: Sequence[Clip]) -> tuple[list[Clip], list[list[int]]]:
        """Return those that are not too long, nor too short for their texts, and the tokens of these."""
        whole: Any = self._model
        kept: list[Clip] = []
        labels: list[list[int]] = []
        for clip in clips:
            length = clip.length(self._rate)
            if length > self._longest:
                self.num_too_long += 1
                continue
            tokens = list(self._tokenizer(clip.text)["input_ids"])
            # CTC needs a frame a token, and one between two that are alike.
            needed = len(tokens) + sum(a == b for a, b in itertools.pairwise(tokens))
            if self._tokenizer.pad_token_id in tokens:
                self._reader.pass_over(
                    f"the text of the clip {clip.path} holds {self._tokenizer.pad_token}, which is CTC's blank"
                )
                continue
            frames = int(whole._get_feat_extract_output_lengths(torch.tensor(length)))
            if not tokens or frames < needed:
                self._reader.pass_over(
                    f"the clip {clip.path} is too short for its text: the model hears {max(0, frames)} frames in it,"
                    f" and {len(tokens)} characters need {needed}"
                )
                continue
            self.num_tokens += len(tokens)
            self.num_unknown += sum(token == self._tokenizer.unk_token_id for token in tokens)
            kept.append(clip)
            labels.append(tokens)
        return kept, labels


def _left_out(reader: PairReader, about: _Usable, data: ClipsConfig) -> Iterator[str]:
    if reader.num_skipped:
        yield f"left out:   {counted(reader.num_skipped, 'clip')} that cannot be used, such as: {reader.skipped[0]}"
    if about.num_too_long:
        yield f"left out:   {counted(about.num_too_long, 'clip')} of more than {data.max_seconds:g} seconds"
    if about.num_unknown:
        yield f"texts:      {about.num_unknown:,} characters that the tokenizer does not have"


def _check_letters(about: _Usable, tokenizer: Any) -> None:
    """Raise DataError where a tokenizer has few of the characters: it would be trained to say that it has none."""
    if 2 * about.num_unknown > about.num_tokens:
        known = " ".join(sorted(token for token in tokenizer.get_vocab() if len(token) == 1)[:40])
        raise DataError(
            f"the tokenizer does not have {about.num_unknown:,} of the texts' {about.num_tokens:,} characters; it has"
            f" {known or 'no single ones'}: give --data.tokenizer one for CTC in the language of the texts, or write"
            " them in its characters"
        )


def _load(recipe: SpeechRecognition, tokenizer: Any) -> nn.Module:
    settings = recipe.model
    config: Any = settings.config
    if settings.path is None and config is None:
        config = small_wav2vec2()
    changes = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "apply_spec_augment": settings.spec_augment,
    }
    model: Any = load_as(
        KIND, settings.path, config, changes, recipe.train.seed, trust_remote_code=settings.trust_remote_code
    )
    if model.main_input_name != "input_values" or not hasattr(model, "_get_feat_extract_output_lengths"):
        raise ConfigError(
            f"{type(model).__name__} does not hear waves (its input is {model.main_input_name}): the recipe ctc is for"
            " models such as Wav2Vec2, HuBERT and WavLM"
        )
    if settings.freeze_features == "yes" or (settings.freeze_features == "auto" and settings.path is not None):
        if not hasattr(model, "freeze_feature_encoder"):
            raise ConfigError(f"{type(model).__name__} cannot have its convolutions frozen: --model.freeze-features no")
        model.freeze_feature_encoder()
    trained: nn.Module = model
    return trained


def _over_those_read(means: dict[str, float]) -> dict[str, float]:
    """Return the loss over the characters of clips that could be read."""
    read = 1 - means.get("unread", 0.0)
    return {**means, "loss": means["loss"] / read if read else float("nan")}


def _transcripts(
    recipe: SpeechRecognition, data: ClipSamples, tokenizer: Any, loss: CtcLoss
) -> tuple[CorpusEvaluation, ...]:
    heard = first_of(data, recipe.eval.samples)
    if heard is None:
        return ()
    references = [clip.text for clip in data.clips[: len(heard)]]

    def score(answers: list[str]) -> dict[str, float]:
        library = needs("jiwer", "the score of what is heard", "speech")
        return {"wer": library.wer(references, answers), "cer": library.cer(references, answers)}

    return (
        CorpusEvaluation(
            data=heard,
            answers=lambda model, batch: write_down(model, batch, loss, tokenizer),
            score=score,
            metrics=("wer", "cer"),
        ),
    )


def _show(model: nn.Module, tokenizer: Any, data: ClipSamples, loss: CtcLoss) -> str:
    """Return what is said in a few held-out clips, and what is heard."""
    chosen = spread(len(data))
    first = next(model.parameters())
    waves, lengths, labels = (part.to(first.device) for part in data.batch(chosen))
    model.eval()
    with torch.no_grad():
        heard = write_down(model, (waves.to(first.dtype), lengths, labels), loss, tokenizer)
    return shown("held-out clips, and what is heard in them:", [data.clips[int(i)].text for i in chosen], heard)


def _fingerprint(train: ClipSamples, held_out: ClipSamples, tokenizer: Any) -> str:
    """Return what changes when the clips do: their names, lengths and texts."""
    digest = hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
    for data in (train, held_out):
        for clip in data.clips:
            digest.update(json.dumps([clip.name, clip.frames, clip.rate, clip.text]).encode())
    return digest.hexdigest()[:32]
