"""Text from a language model: draw the next token, append it, repeat; several prompts at once, with a cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from hvdtrain.errors import ConfigError, DivergedError


class CachingModel(Protocol):
    """A model that can be shown the tokens of a batch bit by bit."""

    training: bool

    def __call__(self, tokens: Tensor, *, cache: Any) -> Tensor:
        """Map tokens, int64 `(B, T)`, that follow those in the cache, to logits `(B, T, V)`."""
        ...

    def new_cache(self, padding: Tensor, max_length: int, reuse: Any = None) -> Any:
        """Return an empty cache for rows that begin with `padding`, int64 `(B,)`, tokens that are not to be seen.

        `reuse` is one of the same size that is no longer needed, if there is one.
        """
        ...

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Return the weights; the first one tells the device."""
        ...

    def train(self, mode: bool = True) -> Any:
        """Set the training mode."""
        ...


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Raises:
        ConfigError: a value is out of range.
    """

    temperature: float = 0.8
    """Divides the logits; 0 always takes the likeliest token."""
    top_k: int | None = None
    """Draw among the k likeliest tokens only. None: among all."""
    top_p: float | None = None
    """Draw among the likeliest tokens that together have at least this probability (arXiv:1904.09751). None: all."""
    seed: int = 0
    """Of the random draws; prompt number i of a batch draws with seed + i, whatever else is in the batch."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(
                f"temperature = {self.temperature} must be finite and not negative; 0 takes the likeliest token"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k = {self.top_k} must be greater than 0; leave it out to draw among all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p = {self.top_p} must be above 0 and at most 1")


def sample(
    model: CachingModel,
    prompts: Sequence[Sequence[int]],
    num_tokens: int,
    *,
    context_length: int,
    sampling: Sampling,
    is_done: Callable[[int, int], bool] = lambda row, token: False,
    use_cache: bool = True,
) -> Iterator[list[int | None]]:
    """Continue prompts: yield the next token of each, None for those that are done. The training mode stays as it was.

    The model is shown at most `context_length` tokens of a row. Whenever there would be more, the older half of them is
    dropped and the rest read again. Random numbers come from generators of their own on the CPU: the same seed draws
    the same numbers on any device and disturbs no one else's.

    Args:
        model: the model.
        prompts: at least one token each.
        num_tokens: the most tokens to add to each.
        context_length: the most tokens the model is shown.
        sampling: how a token is chosen.
        is_done: told each row and new token; True ends the row.
        use_cache: keep keys and values; without, every token costs a pass over all before it. The result is the same.

    Raises:
        ConfigError: an empty prompt, or a setting out of range.
    """
    if not all(prompts):
        raise ConfigError("the prompt is empty: give at least one token to continue")
    if num_tokens < 0:
        raise ConfigError(f"num_tokens = {num_tokens} must not be negative")
    if context_length < 1:
        raise ConfigError(f"context_length = {context_length} must be greater than 0")
    return _sample(model, [list(p) for p in prompts], num_tokens, context_length, sampling, is_done, use_cache)


def _sample(
    model: CachingModel,
    rows: list[list[int]],
    num_tokens: int,
    context_length: int,
    sampling: Sampling,
    is_done: Callable[[int, int], bool],
    use_cache: bool,
) -> Iterator[list[int | None]]:
    generators = [torch.Generator(device="cpu").manual_seed(sampling.seed + i) for i in range(len(rows))]
    context = _Context(model, rows, context_length, use_cache)
    open_rows = set(range(len(rows)))
    for _ in range(num_tokens):
        logits = context.next_logits()
        drawn: list[int | None] = [None] * len(rows)
        for i in sorted(open_rows):
            token = draw(logits[i], sampling, generators[i])
            drawn[i] = token
            if is_done(i, token):
                open_rows.discard(i)
        context.append(drawn)
        yield drawn
        if not open_rows:
            return


class _Context:
    """What the model has been shown of each row, padded on the left to one length."""

    def __init__(self, model: CachingModel, rows: list[list[int]], context_length: int, use_cache: bool) -> None:
        self._model, self._limit, self._use_cache = model, context_length, use_cache
        self._device = next(model.parameters()).device
        self._rows = [row[-context_length:] for row in rows]
        self._length = max(map(len, self._rows))
        self._cache: Any = None
        self._old_cache: Any = None
        self._read = 0

    @torch.inference_mode()
    def next_logits(self) -> Tensor:
        """Return the logits of each row's next token, float64 `(B, V)` on the CPU."""
        if self._length > self._limit:
            half = max(1, self._limit // 2)
            self._rows = [row[-half:] if len(row) > self._limit else row for row in self._rows]
            self._length, self._cache = max(map(len, self._rows)), None
        length = self._length
        if self._cache is None or not self._use_cache:
            padding = torch.tensor([length - len(row) for row in self._rows], device=self._device)
            self._cache = self._old_cache = self._model.new_cache(padding, self._limit, self._old_cache)
            self._read = 0
        if self._read == length - 1 and self._read:
            tokens = torch.tensor([row[-1:] for row in self._rows], device=self._device)
        else:
            tokens = torch.tensor([[0] * (length - len(row)) + row for row in self._rows], device=self._device)
        logits = self._shown(tokens)[:, -1].double().cpu()
        self._read = length
        return logits

    def _shown(self, tokens: Tensor) -> Tensor:
        """Show the model tokens, `(B, T)`, that follow those in the cache, and return their logits."""
        model = self._model
        if not model.training:
            return model(tokens, cache=self._cache)
        model.train(False)
        try:
            return model(tokens, cache=self._cache)
        finally:
            model.train(True)

    def append(self, tokens: Sequence[int | None]) -> None:
        """Take in a token of each row; of one that is done, anything."""
        for row, token in zip(self._rows, tokens, strict=True):
            row.append(token or 0)
        self._length += 1


@torch.inference_mode()
def draw(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Draw a token from logits, float64 `(V,)`.

    Raises:
        DivergedError: they are no numbers.
    """
    if sampling.temperature == 0:
        likeliest = int(logits.argmax())
        _check(float(logits[likeliest]))
        return likeliest
    count = len(logits) if sampling.top_k is None else min(sampling.top_k, len(logits))
    values, tokens = logits.topk(count)  # the likeliest first
    _check(float(values[0]))
    # What softmax does anyway; here it keeps quotients by a temperature next to 0 from being infinite.
    probabilities = ((values - values[0]) / sampling.temperature).softmax(dim=0)
    if sampling.top_p is not None:
        before = probabilities.cumsum(0) - probabilities
        probabilities = probabilities.where(before < sampling.top_p, 0)
    # The first of independent exponential clocks that run at these rates: what `torch.multinomial` does, but for its
    # tests of what was tested here.
    times = torch.empty_like(probabilities).exponential_(generator=generator)
    return int(tokens[int((probabilities / times).argmax())])


def _check(value: float) -> None:
    if not math.isfinite(value):
        raise DivergedError(
            "the model's logits are not finite: it is broken, or was trained until it was; choose another checkpoint"
        )
