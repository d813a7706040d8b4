"""Streams: data that comes one sample after another, such as torch's `IterableDataset`, resumed where it was left.

Every rank runs through the whole stream and keeps its part of each global batch, so what a step sees depends neither on
the number of ranks nor on the stream's cooperation. A stream that ends begins again.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hvdtrain.data.collating import Collate, Collating
from hvdtrain.data.dataset import checked_sample
from hvdtrain.data.draws import Draws, kept_random_state
from hvdtrain.data.own_generators import Generator, generators_in
from hvdtrain.errors import DataError

ENDLESS = 1 << 48
"""Number of samples of a stream that does not say how many it has."""
# So many batches may be read ahead of the step whose state is saved.
_SNAPSHOTS = 256
_PLAIN = (bool, int, float, str, bytes, Tensor, type(None))
# Where Python's own iterators are from, such as `map`, `zip`, `itertools.chain`, open files and `csv.reader`.
_ITERATORS = ("builtins", "itertools", "_io", "_csv")
_OVER = object()


@dataclass
class _Place:
    """How far a stream has been read."""

    position: int = 0
    """Samples that came so far, over all passes."""
    passes: int = 0
    """Passes that have ended."""
    pass_began: int = 0
    """Position at which the present pass began."""
    stream: Any = None
    """What the stream's `state_dict` returned; None where it has none."""


class StreamSamples:
    """A `Dataset` of what an iterable yields: sample i is the one that comes after i others.

    What the next sample draws by torch (on the CPU), numpy or Python, or by a generator that the stream keeps, is a
    function of (seed, its number).

    Args:
        stream: can be iterated, alike on every rank and every time. Where it has `state_dict` and `load_state_dict`, a
            resumed run takes its state back; else, or where that state is known not to hold all, as many samples as
            were seen are read and dropped. Where it has `set_epoch`, that is called with the number of each pass.
        collate: makes a batch of a list of samples; None for torch's `default_collate`.
    """

    is_sequential = True

    def __init__(self, stream: Any, collate: Collate | None) -> None:
        self.stream = stream
        self._own: tuple[Generator, ...] | None = None
        self._collate = Collating(collate)
        self._samples: Iterator[Any] | None = None
        self._has_begun = False
        self._has_state = _says_where_it_is(stream)
        self._place = _Place()
        self._snapshots: deque[_Place] = deque(maxlen=_SNAPSHOTS)

    @property
    def collate_draws(self) -> bool:
        """Return whether the function that makes batches is known to draw random numbers."""
        return bool(self._collate.draws)

    @property
    def is_endless(self) -> bool:
        """Return whether the stream does not say how many samples it has."""
        return len(self) == ENDLESS

    def __len__(self) -> int:
        try:
            return len(self.stream)
        except (TypeError, NotImplementedError):  # torch's ChainDataset has a length where all its parts have one
            return ENDLESS

    def batch(self, indices: Tensor, draws: Draws | None = None) -> Any:
        """Return the collated samples `indices`, int64 `(n,)`, ascending; only those that follow are quick to reach.

        Raises:
            DataError: the stream is empty, or ends elsewhere than it says.
        """
        if len(indices) == 0:
            raise DataError(
                "a rank has no samples in a short batch, and layers that work over all ranks need some: give the stream"
                " no length, or one that is a multiple of the global batch"
            )
        draws = draws or Draws(0, 0, indices)
        with kept_random_state():
            before = 0 if len(self) == ENDLESS else draws.epoch * len(self)
            self._reach(before + int(indices[0]), draws.seed)
            self._snapshots.append(self._observed())
            samples = []
            for index in indices.tolist():
                self._reach(before + index, draws.seed)
                samples.append(checked_sample(self._next(draws.seed), before + index))
            return self._collate(samples, self._own or ())

    def num_targets(self, indices: Tensor) -> int:
        """Return what the stream itself counts, by a method of this name; else one a sample."""
        count = getattr(self.stream, "num_targets", None)
        return int(count(indices)) if callable(count) else len(indices)

    def check_state(self) -> None:
        """Raise DataError where the stream's own state is nothing that a checkpoint can hold."""
        if self._has_state:
            _check_plain(self.stream.state_dict(), type(self.stream).__name__)

    def state_at(self, position: int) -> dict[str, Any]:
        """Return what `go_on` needs to begin with the sample that comes after `position` others.

        Raises:
            DataError: the stream's own state is nothing that a checkpoint can hold.
        """
        known = [place for place in (*self._snapshots, self._observed()) if place.position <= position]
        place = known[-1] if known and known[-1].stream is not None else _Place()
        _check_plain(place.stream, type(self.stream).__name__)
        return dict(vars(place))

    def go_on(self, state: dict[str, Any]) -> None:
        """Take up a state that `state_at` returned."""
        self._place = _Place(**state)
        self._snapshots.clear()
        if self._place.stream is not None:
            self._set_epoch()  # by which some streams know whether a state is of this pass
            self.stream.load_state_dict(copy.deepcopy(self._place.stream))
            self._samples = iter(self.stream)

    def _observed(self) -> _Place:
        own = copy.deepcopy(self.stream.state_dict()) if self._has_state else None
        return dataclasses.replace(self._place, stream=own)

    def _reach(self, position: int, seed: int) -> None:
        """Read and drop what comes before the sample that follows `position` others."""
        if position < self._place.position:
            self._place, self._samples = _Place(), None
            self._snapshots.clear()
        while self._place.position < position:
            self._next(seed)

    def _next(self, seed: int) -> Any:
        """Return the next sample, from the next pass if this one has ended."""
        place = self._place
        if self._own is None:
            self._own = generators_in(self.stream)
        Draws(seed, 0, torch.tensor([place.position])).seed_generators(0, self._own)
        if self._samples is None:
            self._samples = self._begin()
        if place.position - place.pass_began == len(self):
            self._end_pass()
        try:
            sample = next(self._samples)
        except StopIteration:
            self._check_end()
            self._end_pass()
            sample = next(self._samples, _OVER)
            if sample is _OVER:
                raise self._passed() from None
        place.position += 1
        return sample

    def _passed(self) -> DataError:
        return DataError(
            f"the stream {type(self.stream).__name__} comes once, and is needed again, from its beginning: give a class"
            " whose method __iter__ begins anew each time, such as one that calls your generator function, or a list"
        )

    def _begin(self) -> Iterator[Any]:
        if self._has_begun and _comes_once(self.stream):
            raise self._passed()
        self._has_begun = True
        self._set_epoch()
        return iter(self.stream)

    def _set_epoch(self) -> None:
        if hasattr(self.stream, "set_epoch"):
            self.stream.set_epoch(self._place.passes)

    def _end_pass(self) -> None:
        self._place.passes += 1
        self._place.pass_began = self._place.position
        self._samples = self._begin()

    def _check_end(self) -> None:
        came = self._place.position - self._place.pass_began
        if came == 0 or len(self) != ENDLESS:
            says = f", but its length is {len(self)}" if len(self) != ENDLESS else ""
            raise DataError(f"the stream {type(self.stream).__name__} has ended after {came} samples{says}")


def _says_where_it_is(stream: Any) -> bool:
    """Tell whether a stream goes on exactly from a state of its own.

    Those of the library `datasets` leave out what a shuffle buffer holds: these samples would not come.
    """
    if not hasattr(stream, "state_dict") or not hasattr(stream, "load_state_dict"):
        return False
    parts = [getattr(stream, "_ex_iterable", None)]
    for part in parts:  # grows meanwhile
        if type(part).__name__ == "BufferShuffledExamplesIterable":
            return False
        parts += [getattr(part, "ex_iterable", None)] if hasattr(part, "ex_iterable") else []
        parts += getattr(part, "ex_iterables", [])
    return True


def _comes_once(stream: Any) -> bool:
    """Tell whether an iterable is a generator or another iterator of Python's own: what has passed is gone."""
    is_pythons = isinstance(stream, Iterator) and type(stream).__module__ in _ITERATORS
    return inspect.isgenerator(stream) or is_pythons


def _check_plain(state: Any, name: str) -> None:
    """Raise DataError where a stream's state holds what a checkpoint cannot."""
    if isinstance(state, dict):
        values = [*state.keys(), *state.values()]
    elif isinstance(state, (list, tuple)):
        values = list(state)
    elif type(state) in _PLAIN:
        return
    else:
        raise DataError(
            f"state_dict() of the stream {name} holds a {type(state).__module__}.{type(state).__qualname__}, which no"
            " checkpoint can hold: return numbers, text, tensors, and lists and dictionaries of them"
        )
    for value in values:
        _check_plain(value, name)
