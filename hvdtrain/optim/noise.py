"""The gradient noise scale: how large a batch is still worth its samples (arXiv:1812.06162). Pure functions.

With G the true gradient and tr(S) the variance of one sample's, B_noise = tr(S) / |G|^2. The gradient of b samples has
E|g_b|^2 = |G|^2 + tr(S) / b; two batch sizes give both unknowns without bias (appendix A.1):

    |G|^2 = (B |g_B|^2 - b |g_b|^2) / (B - b)        tr(S) = (|g_b|^2 - |g_B|^2) / (1 / b - 1 / B)

Reaching a loss takes S = S_min (1 + B_noise / B) steps (equation 2.7). The scale grows while a model learns, and says
nothing of the learning rate that a batch needs; arXiv:2410.21676 finds critical batch sizes that follow the amount of
data rather than the model. It is an estimate for the part of the training in which it was measured.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

_RESAMPLES = 1000
_T = TypeVar("_T")


@dataclass(frozen=True)
class NoiseScale:
    """B_noise in samples, and an interval that holds it with 90 % confidence. Infinite where no gradient is left."""

    samples: float
    low: float
    high: float
    measurements: int
    is_whole_training: bool = False
    """It stands for all of a training, not for the part of it in which it was measured."""


@dataclass(frozen=True)
class Norms:
    """Squared gradient norms of one step."""

    small: float
    """Mean of |g_b|^2 over batches of b samples."""
    large: float
    """|g_B|^2 of all of them together."""


def noise_scale(norms: Sequence[Norms], small_batch: float, large_batch: float, seed: int = 0) -> NoiseScale:
    """Return the noise scale of several steps: the ratio of the two means, with an interval by the bootstrap.

    Args:
        norms: of each step.
        small_batch: b, samples.
        large_batch: B, samples.
        seed: of the resampling.

    Raises:
        ValueError: there is nothing to compare.
    """
    if not norms or not 0 < small_batch < large_batch:
        raise ValueError(f"{len(norms)} steps with batches of {small_batch} and {large_batch} have no noise scale")

    def ratio(chosen: Sequence[Norms]) -> float:
        signal, variance = estimate(chosen, small_batch, large_batch)
        return max(0.0, variance / signal) if signal > 0 else float("inf")

    low, high = _interval(norms, ratio, seed)
    return NoiseScale(ratio(norms), low, high, len(norms))


def noise_of_training(scales: Sequence[tuple[int, float]], batch: float, seed: int = 0) -> NoiseScale:
    """Return the one noise scale that stands for a training, while its own grows from window to window.

    n steps with a batch of B samples, at a noise scale N, made the progress of n / (1 + N / B) steps with unlimited
    batches, each of which takes 1 + N / b steps with a batch of b. Summed over the windows that is S_min (1 + mean / b)
    with the mean of N weighted by that progress: equation 2.7 once more.

    Args:
        scales: steps and noise scale (samples, may be infinite) of each window.
        batch: B, samples.
        seed: of the resampling.

    Raises:
        ValueError: there are none.
    """
    if not scales:
        raise ValueError("no window has a noise scale")

    def mean(chosen: Sequence[tuple[int, float]]) -> float:
        progress = sum(steps / (1 + noise / batch) for steps, noise in chosen)
        weighted = sum(steps / (1 / noise + 1 / batch) for steps, noise in chosen if noise > 0)
        return weighted / progress if progress > 0 else float("inf")

    low, high = _interval(scales, mean, seed)
    return NoiseScale(mean(scales), low, high, len(scales), is_whole_training=True)


def _interval(values: Sequence[_T], figure: Callable[[Sequence[_T]], float], seed: int) -> tuple[float, float]:
    """Return what a figure of resampled values lies between with 90 % confidence (the percentile bootstrap)."""
    draws = random.Random(seed)
    resampled = sorted(figure(draws.choices(values, k=len(values))) for _ in range(_RESAMPLES))
    return resampled[int(0.05 * _RESAMPLES)], resampled[int(0.95 * _RESAMPLES)]


def estimate(norms: Sequence[Norms], small_batch: float, large_batch: float) -> tuple[float, float]:
    """Return unbiased estimates of |G|^2 and of tr(S)."""
    small = sum(norm.small for norm in norms) / len(norms)
    large = sum(norm.large for norm in norms) / len(norms)
    signal = (large_batch * large - small_batch * small) / (large_batch - small_batch)
    variance = (small - large) / (1 / small_batch - 1 / large_batch)
    return signal, variance


def steps_ratio(noise: float, batch: float, reference: float) -> float:
    """Return how many steps a batch needs to the same loss, relative to a reference batch.

    (1 + noise / batch) / (1 + noise / reference); with infinite noise, reference / batch.
    """
    if noise == float("inf"):
        return reference / batch
    return (1 + noise / batch) / (1 + noise / reference)


def agreement(norms: Norms, workers: int) -> float:
    """Return the mean cosine-like agreement of workers' gradients: mean product of pairs / mean squared norm.

    From |mean g|^2 = (sum |g_i|^2 + sum of the products of pairs) / n^2.
    """
    if workers < 2 or norms.small <= 0:
        return 1.0
    products = (workers**2 * norms.large - workers * norms.small) / (workers * (workers - 1))
    return products / norms.small
