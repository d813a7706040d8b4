"""Clips of speech: found with their texts, measured once per host, and read as batches of waves."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hvdtrain.data.text.corpus import find_documents
from hvdtrain.data.text.encodings import read_text
from hvdtrain.data.text.known import KnownFiles
from hvdtrain.data.text.pair_samples import NOTHING
from hvdtrain.data.text.pairs import PairReader
from hvdtrain.errors import DataError, one_line, reason_of
from hvdtrain.process.output import tell

SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif", ".au", ".caf", ".w64")
_LISTS = ".trans.txt"
# What soundfile's library says of WAV, AIFF, AU and W64 files that are shorter than their headers say; it reads what is
# there.
_CUT = re.compile(r"^ *(?:data|SSND|Data Size|riff) *: *(\d+) \(should be (\d+)\)", re.MULTILINE)
_UNKNOWN_SIZE = 0x7FFF_0000
"""What is written to a pipe has a header of at least this size."""


@dataclass(frozen=True)
class Clip:
    """A clip of speech and what is said in it."""

    path: Path
    name: str
    """Its path within the data."""
    text: str
    frames: int = 0
    """Of the file, at its own rate."""
    rate: int = 0
    """Frames a second."""

    def length(self, rate: int) -> int:
        """Return how many frames it has at another rate."""
        return self.frames if rate == self.rate else -(-self.frames * rate // self.rate)


def find_clips(path: str, reader: PairReader) -> list[Clip]:
    """Return the clips of a directory, a glob or a table, not measured yet; `reader` counts those without a text.

    Raises:
        DataError: there are none, or one has no text and is not to be passed over.
    """
    documents = find_documents(path, lambda lost: reader.pass_over(f"the clip {lost} is a link to what is not there"))
    heard = [document for document in documents if document.path.suffix.lower() in SUFFIXES]
    if not heard:
        clips = [
            Clip(document.path.parent / _at_home(name), name, text)
            for document in documents
            for name, text in reader.read([document])
        ]
        if not clips:
            raise DataError(f"{path} holds no clips of speech ({', '.join(SUFFIXES)}) and no table of them")
        return clips
    listed = _listed({document.path.parent for document in heard}, reader)
    found = []
    for document in heard:
        beside = document.path.with_suffix(".txt")
        text = read_text(beside, str(beside)) if beside.is_file() else listed.get(document.path, "")
        text = " ".join(text.split())
        if text:
            found.append(Clip(document.path, document.name, text))
        else:
            reader.pass_over(f"the clip {document.path} has no text: {beside.name} beside it is missing or empty")
    return found


def _at_home(name: str) -> str:
    """Return a path of a table with `~` replaced; where there is no such user it stays, and names no file."""
    return os.path.expanduser(name)  # noqa: PTH111  pathlib raises there


def _listed(folders: set[Path], reader: PairReader) -> dict[Path, str]:
    """Return the texts of clips that files NAME.trans.txt list, as LibriSpeech has them: a clip's name and its text.

    Raises:
        DataError: a clip is not there, and is not to be passed over.
    """
    texts: dict[Path, str] = {}
    for folder in folders:
        heard = {path.stem: path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES}
        for file in folder.glob(f"*{_LISTS}"):
            for line in read_text(file, str(file)).split("\n"):
                parts = line.split(maxsplit=1)
                if parts and parts[0] not in heard:
                    reader.pass_over(f"the clip {parts[0]}, which {file} lists, is not there")
                elif len(parts) == 2:
                    texts[heard[parts[0]]] = parts[1]
    return texts


def measured(clips: Sequence[Clip], cache: Path, corpus: str, reader: PairReader) -> list[Clip]:
    """Return the clips with their lengths, which are looked up once per host; `reader` counts those without one.

    Raises:
        DataError: a clip cannot be read, and is not to be passed over.
    """
    known = KnownFiles(cache, f"sounds of {corpus}")
    paths = {str(clip.path): clip.path for clip in clips}
    there = {name: path for name, path in paths.items() if path.is_file()}
    values = known.values(there, lambda name: _measure(there[name]))
    found = []
    for clip in clips:
        value = values.get(str(clip.path), "there is no such file")
        if isinstance(value, str):
            reader.pass_over(f"the clip {clip.path} cannot be read ({value})")
        elif value[0] == 0:
            reader.pass_over(f"the clip {clip.path} is empty")
        else:
            found.append(Clip(clip.path, clip.name, clip.text, *value))
    return found


def _measure(path: Path) -> list[int] | str:
    """Return frames and rate of a clip, or what is wrong with it."""
    import soundfile

    try:
        with path.open("rb"):  # the system's own reason; soundfile's is "System error."
            about = soundfile.info(str(path), verbose=True)
    except OSError as error:
        return reason_of(error)
    except Exception as error:  # the library's own, or the system's
        return one_line(error)
    cut = _CUT.search(about.extra_info)
    if cut is not None and int(cut[2]) < int(cut[1]) < _UNKNOWN_SIZE:
        return f"it was cut: of {int(cut[1]):,} bytes of sound {int(cut[2]):,} are there"
    return [int(about.frames), int(about.samplerate)]


def read_wave(path: Path, rate: int) -> NDArray[np.float32]:
    """Return a clip as `(frames,)` at this rate, the mean of its channels.

    Raises:
        Exception: whatever soundfile raises where it cannot be read; ValueError where it holds what is no number.
    """
    import soundfile

    wave, own = soundfile.read(str(path), dtype="float32", always_2d=True)
    if not np.isfinite(wave).all():
        raise ValueError("it holds numbers that are not finite")
    mono: NDArray[np.float32] = wave.mean(1)
    if own != rate:
        import soxr

        mono = soxr.resample(mono, own, rate)
    return mono


class ClipSamples:
    """A `Dataset` of clips.

    Args:
        clips: measured.
        labels: what is said in each, as tokens.
        rate: frames a second that the model hears.
        is_normalised: whether each wave is brought to mean 0 and variance 1.
        may_skip: whether a clip that turns out to be damaged is passed over.
    """

    reads_ahead = True

    def __init__(
        self, clips: Sequence[Clip], labels: Sequence[Sequence[int]], rate: int, is_normalised: bool, may_skip: bool
    ) -> None:
        self.clips, self._labels = list(clips), [np.asarray(tokens, np.int64) for tokens in labels]
        self._rate, self._is_normalised, self._may_skip = rate, is_normalised, may_skip
        self.lengths = np.asarray([clip.length(rate) for clip in clips], np.int64)
        """Frames of each clip, as the model hears it."""
        self._num_labels = np.asarray([len(tokens) for tokens in labels], np.int64)
        self._named: set[int] = set()

    def __len__(self) -> int:
        return len(self.clips)

    def num_targets(self, indices: Tensor) -> int:
        """Return the tokens of the texts."""
        return int(self._num_labels[indices.numpy()].sum())

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the samples `indices`, int64 `(n,)`.

        Returns:
            Waves, fp32 `(n, L)`, filled up with zeros; their lengths, int64 `(n,)`, 0 for a clip that could not be
            read; and labels, int64 `(n, T)`, filled up with `NOTHING`.

        Raises:
            DataError: a clip cannot be read, and is not to be passed over.
        """
        rows = indices.numpy()
        waves = torch.zeros(len(rows), int(self.lengths[rows].max(initial=1)))
        lengths = torch.zeros(len(rows), dtype=torch.int64)
        labels = torch.full((len(rows), int(self._num_labels[rows].max(initial=1))), NOTHING)
        for row, number in enumerate(rows):
            wave = self._wave(int(number))
            tokens = self._labels[number]
            labels[row, : len(tokens)] = torch.from_numpy(tokens)
            if wave is not None:
                waves[row, : len(wave)] = wave
                lengths[row] = len(wave)
        return waves, lengths, labels

    def _wave(self, number: int) -> Tensor | None:
        clip, length = self.clips[number], int(self.lengths[number])
        try:
            wave = read_wave(clip.path, self._rate)
            if abs(len(wave) - length) > 1:  # a resampler may round another way
                raise ValueError(f"it has {len(wave)} frames, and its header says {length}")
        except MemoryError:
            raise
        except Exception as error:  # decoders fail in many ways
            self._pass_over(number, error)
            return None
        wave = np.pad(wave[:length], (0, length - len(wave[:length])))
        return torch.from_numpy(normalised(wave) if self._is_normalised else wave)

    def _pass_over(self, number: int, error: Exception) -> None:
        text = f"the clip {self.clips[number].path} cannot be read ({one_line(error)})"
        if not self._may_skip:
            raise DataError(f"{text}: mend or remove it, or pass over such clips with --data.on-error skip") from error
        if number not in self._named:
            self._named.add(number)
            tell(f"hvdtrain: WARNING: {text}: passed over")


def normalised(wave: NDArray[Any]) -> NDArray[np.float32]:
    """Return a wave with mean 0 and variance 1, as transformers' feature extractors make it."""
    own: NDArray[np.float32] = ((wave - wave.mean()) / np.sqrt(wave.var() + 1e-7)).astype(np.float32)
    return own
