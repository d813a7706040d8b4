"""Random numbers that belong to samples, not to ranks: dropout is the same on any number of ranks.

torch draws a batch's random numbers one after the other, so the ones that a sample gets depend on what else is in its
micro-batch. While `SampleRandomness` is entered they are instead a function of (seed, step, how many draws the step
made before, position of the sample in the global batch, place in the sample's own tensor, however far that is padded).
That holds for what `random_functions.py` and `random_layers.py` name, wherever its tensor has the samples of the
micro-batch as its first dimension: dropout in all its forms, also inside attention, `rand`, `randn`, `randint`,
`normal`, `bernoulli`, `multinomial`, `exponential_` and their like, and so for what `torch.distributions` makes of
them. A single number of `rand` or `randn`, such as what drops a layer, is the same for all samples of a step.

Anything else (`randperm`, Poisson and gamma variates, the dropout inside `nn.LSTM`, Python's `random`, numpy, a
generator that the model keeps) draws from its own generator, which is seeded for each micro-batch: the numbers differ
on every rank and in every micro-batch, and are the same when a run is repeated or resumed on as many ranks.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hvdtrain.data.own_generators import Generator
from hvdtrain.models.kept import KeptBuffers, buffer_places
from hvdtrain.models.private_torch import function_modes
from hvdtrain.trainer.compiled_draws import OPERATORS, compiled_keys
from hvdtrain.trainer.random_functions import FUNCTIONS
from hvdtrain.trainer.random_layers import LAYERS
from hvdtrain.trainer.random_words import GOLDEN, mix64, words
from hvdtrain.trainer.seeding import Generators

A = TypeVar("A")
T = TypeVar("T")

_ANSWERS = {**FUNCTIONS, **LAYERS, **OPERATORS}


class SampleRandomness(TorchFunctionMode):
    """Draws random numbers for the samples of one micro-batch; enter it around reading, forward and backward.

    Args:
        positions: int64 `(n,)`, where the micro-batch's samples stand in the global batch.
        seed: of the step, the same for all micro-batches of all ranks.
    """

    def __init__(self, positions: Tensor, seed: int = 0) -> None:
        super().__init__()
        self._positions = positions
        self._draws = torch.zeros((), dtype=torch.int64, device="cpu")
        self._source = torch.Generator().manual_seed(seed)
        self._drawn: dict[int, tuple[int, Tensor]] = {}
        """By the mark of a draw: its salt, and the positions that it was for."""
        self._goes_by_rows = False
        self.own_draws: list[tuple[str, str]] | None = None
        """Names and results of functions that were given a generator; None: not noted."""

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """Do not count what is drawn within: the numbers drawn afterwards are those that would have come anyway."""
        drawn, source = dict(self._drawn), self._source.get_state()
        try:
            yield
        finally:
            self._drawn = drawn
            self._source.set_state(source)

    def rows(self, count: int) -> Iterator[int]:
        """Yield the rows of the micro-batch; meanwhile a tensor's samples are the one that stands there."""
        positions, source = self._positions, self._source.get_state()
        self._goes_by_rows = True
        try:
            for row in range(count):
                self._source.set_state(source)  # the first draw of each is the first of them all
                self._positions = positions[row : row + 1]
                yield row
        finally:
            self._positions = positions

    @property
    def num_draws(self) -> int:
        """Return how many times numbers were drawn for samples."""
        return len(self._drawn)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Answer the functions that are named above; pass all others on."""
        if self.own_draws is not None and (kwargs or {}).get("generator") is not None:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                self.own_draws.append((func.__name__, str(result.tolist())))
            return result
        own = _ANSWERS.get(func)
        if own is not None:
            answer = own(self, *args, **(kwargs or {}))
            if answer is not NotImplemented:  # a tensor whose first dimension is not the samples
                return answer
        return func(*args, **(kwargs or {}))

    def uniform(self, shape: Sequence[int], device: torch.device) -> Tensor | None:
        """Return fp32 numbers in [0, 1) of this shape, in steps of 2^-24; None if its first dimension is not `n`."""
        if not self._is_of_samples(shape):
            return None
        return (words(self._keys(device), shape).bitwise_right_shift_(8).bitwise_and_(0xFFFFFF)).float() * 2.0**-24

    def of_step(self, device: torch.device) -> Tensor:
        """Return one fp32 number in [0, 1), the same for all samples of the step: what no sample draws by itself."""
        bits = mix64(torch.tensor(self._draw()[0], device="cpu")) >> 8 & 0xFFFFFF
        return bits.float().mul(2.0**-24).to(device, non_blocking=True)  # else a GPU would be waited for

    def fine(self, shape: Sequence[int], device: torch.device) -> Tensor | None:
        """Return fp64 numbers in [0, 1) of this shape, in steps of 2^-53; None if its first dimension is not `n`."""
        if not self._is_of_samples(shape):
            return None
        keys = self._keys(device)
        high = words(keys, shape).long() >> 5 & 0x7FFFFFF
        low = words(mix64(keys + GOLDEN), shape).long() >> 6 & 0x3FFFFFF
        return (high * 2**26 + low).double() * 2.0**-53

    def next_seeds(self, shape: Sequence[int]) -> list[int] | None:
        """Return a seed of 63 bits for each sample; None if the first dimension of this shape is not `n`."""
        if not self._is_of_samples(shape):
            return None
        seeds: list[int] = (self.next_keys(torch.device("cpu")) & (2**63 - 1)).tolist()
        return seeds

    def _is_of_samples(self, shape: Sequence[int]) -> bool:
        if len(shape) == 0 or 0 in shape:
            return False
        return shape[0] == len(self._positions) or (self._goes_by_rows and shape[0] == 1 and self._is_drawn_again())

    def _is_drawn_again(self) -> bool:
        """Return whether the next draw is one of a single row, computed again after all rows have passed."""
        state = torch.default_generator.get_state()
        _, positions = self._drawn.get(_next_mark(), (0, self._positions))
        torch.default_generator.set_state(state)
        return len(positions) == 1

    def _keys(self, device: torch.device) -> Tensor:
        """Return int64 `(n,)`, a key for each sample, of the next draw.

        In one piece with what a compiler makes of the rest: it must not look at a number in the midst of a model.
        """
        if torch.compiler.is_compiling():
            return compiled_keys(self._positions, self._draws, device)
        return self.next_keys(device)

    def next_keys(self, device: torch.device) -> Tensor:
        """Return the same, computed now."""
        salt, positions = self._draw()
        return mix64(positions.to(device, non_blocking=True) * GOLDEN + salt)

    def _draw(self) -> tuple[int, Tensor]:
        """Return the salt of this draw, the same in all micro-batches of all ranks, and the positions it is for.

        A number from torch's own generator tells one draw from another. Activation checkpointing puts that generator
        back before it computes something again: the same number, and so the same salt.
        """
        mark = _next_mark()
        if mark not in self._drawn:
            salt = torch.randint(2**62, (), generator=self._source, device="cpu")
            self._drawn[mark] = int(salt), self._positions
        return self._drawn[mark]


def _next_mark() -> int:
    return int(torch.randint(2**62, (), device="cpu"))


def one_by_one(count: int) -> Iterator[int]:
    """Yield the rows of a micro-batch, `0 .. count - 1`, for a model through which its samples pass one at a time.

    Meanwhile a tensor whose first dimension is 1 is of that sample, which draws what it draws in any other micro-batch.
    """
    modes = (mode for mode in reversed(function_modes()) if isinstance(mode, SampleRandomness))
    mode = next(modes, None)
    return iter(range(count)) if mode is None else mode.rows(count)


class MicroBatchRandomness:
    """Puts `SampleRandomness` around micro-batches, if they draw any random numbers: it slows small models down.

    The first micro-batch shows whether they do. If a later one begins to, its forward pass is computed once more.

    Args:
        device: of the model.
        is_observed: find out what is drawn; slower.
        model: whose buffers a pass may change; None: it changes none.
        is_compiled: it or a part of it is: then it is taken to draw nothing until it does, since a function mode would
            cut the first compilation to pieces, and all would be compiled anew for the second.
        own: generators that the model or its loss keeps.
    """

    def __init__(
        self,
        device: torch.device,
        is_observed: bool = False,
        model: nn.Module | None = None,
        is_compiled: bool = False,
        own: Sequence[Generator] = (),
    ) -> None:
        self.generators = Generators(device, own)
        self._is_needed: bool | None = False if is_compiled else None
        self._model = model
        self._kept: KeptBuffers | None = None
        """The buffers that a pass may change; None before the first one."""
        self._mode: SampleRandomness | None = None
        self._first: tuple[Tensor | None, list[int]] = (None, [])
        self.is_observed = is_observed
        self.is_by_sample = False
        """Whether numbers were drawn that belong to samples."""
        self.by_micro_batch: set[str] = set()
        """Whose numbers were drawn that belong to micro-batches: torch, torch on the GPU, numpy, Python."""
        self.own_draws: list[tuple[str, str]] = []
        """Where it is observed: names and results of functions that were given a generator."""

    def run(
        self, positions: Tensor, place: Sequence[object], forward: Callable[[], T], backward: Callable[[T], None]
    ) -> T:
        """Run both passes over the samples at `positions`, int64 `(n,)`, of the global batch; returns forward's result.

        Random numbers derive from a place in the run (seed, step), not from history: resuming needs no saved state.
        """
        if positions is not self._first[0]:  # steps are cut alike
            self._first = positions, positions[:1].tolist()
        seed = _seed_of(*place, *self._first[1])
        self.generators.seed(seed)
        if self._is_needed is False and not self.is_observed:
            kept = self._kept_buffers()
            result = forward()
            self._note_buffers(kept)
            if self.generators.is_untouched(seed):
                backward(result)
                return result
            self.generators.seed(seed)
            kept.put_back()
        self._mode = mode = SampleRandomness(positions, _seed_of(*place))
        mode.own_draws = self.own_draws if self.is_observed else None
        kept = self._kept_buffers() if self._is_needed is None else KeptBuffers([])
        with mode:
            result = forward()
            self._is_needed = not self.generators.is_untouched(seed)
            self._note_buffers(kept)
            self._note(mode, seed)
            mode.own_draws = None  # what hooks draw meanwhile, a codec's or a user's, is for no sample
            backward(result)
        return result

    @contextlib.contextmanager
    def observed(self, say: Callable[[str], None]) -> Iterator[None]:
        """Find out what a micro-batch draws, the first one, and say what of it belongs to no sample."""
        if self.is_observed or self._is_needed is False:  # a compiled model would be cut to pieces
            yield
            return
        self.is_observed = True
        try:
            yield
        finally:
            self.is_observed = False
        if self.by_micro_batch:
            say(
                f"random:     numbers from {', '.join(sorted(self.by_micro_batch))} belong to micro-batches, not to"
                " samples: others on another number of ranks (verify RECIPE says more)"
            )

    def _kept_buffers(self) -> KeptBuffers:
        """Return what a pass may change, in the first all buffers: one that is repeated counts once."""
        if self._kept is None:
            return KeptBuffers(buffer_places(self._model) if self._model is not None else [])
        self._kept.take()
        return self._kept

    def _note_buffers(self, kept: KeptBuffers) -> None:
        """Note, after the first pass, what is kept in later ones: what it has changed, and what is saved of a model."""
        if self._kept is None and self._model is not None:
            saved = buffer_places(self._model, is_saved=True)
            self._kept = KeptBuffers([*saved, *(place for place in kept.changed() if place not in saved)])

    def apart(self, function: Callable[[A], T], argument: A) -> T:
        """Call a function within a micro-batch, and let it draw what it likes: the micro-batch draws the same after it.

        torch's generators are for the caller to put back.
        """
        with self._mode.apart() if self._mode is not None else contextlib.nullcontext():
            return function(argument)

    def _note(self, mode: SampleRandomness, seed: int) -> None:
        """Note what a forward pass has drawn from."""
        if self.is_observed:
            self.is_by_sample |= mode.num_draws > 0
            self.by_micro_batch |= self.generators.drawn_from(seed, mode.num_draws)


def _seed_of(*place: object) -> int:
    digest = hashlib.blake2b(" ".join(map(str, place)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
