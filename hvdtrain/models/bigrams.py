"""A decoder that begins at what counts of two tokens in a row predict, instead of at nothing.

A block of a fresh decoder adds next to nothing to the residual stream, so the logits are `W norm(e_i)`, a function of
the present token i alone. The best one is the logarithm of

    P(j | i) = (c_ij + t_i p_j) / (c_i + t_i)

where `c_ij` counts how often j follows i, `t_i` the different tokens that follow i, and `p_j` is the frequency of j
(Witten and Bell 1991, method C, as in `models.ngram`). Without what softmax takes away it is

    log p_j + S_ij,    S_ij = log(1 + c_ij / (t_i p_j)),

and S is zero wherever j never followed i. The embeddings are the first left singular vectors of S, its rows weighted by
the roots of their frequencies; the output layer is fitted to it by least squares. Training begins there: the first
steps, which would learn this table, are saved, and tokens that are followed by the same ones are alike from the start.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from hvdtrain.models.decoder import Decoder

# More directions than these tell next to nothing, and would take minutes to find.
_MOST_DIRECTIONS = 1024
# Of subspace iterations (Halko, Martinsson and Tropp 2011, arXiv:0909.4061, algorithm 4.3).
_ITERATIONS = 2
_OVERSAMPLING = 20
# Of the channel that is the same for all tokens, beside a row of length 1: it holds the frequencies of tokens.
_CONSTANT = 0.5
# Eigenvalues below this share of the largest, squares of singular values in fp32, are rounding.
_ROUNDING = 1e-12
# Added to the diagonal of the least squares, as a share of its mean.
_RIDGE = 1e-4
# Counts that are kept of pairs that never come, too: 128 MiB.
_TABLE = 1 << 24
# Of the embeddings, whose mean square is 1 without it: what the blocks add weighs the more, the smaller it is.
_SCALE = 0.5


@torch.no_grad()
def begin_at_bigrams(model: Decoder, tokens: NDArray[Any], seed: int) -> None:
    """Set the embeddings and the output layer, which must be two matrices, to what predicts these tokens' successors.

    What comes out depends on the seed and the tokens, not on the number of threads.

    Args:
        model: its weights are those it was built with.
        tokens: `(n,)`, n >= 2, of training text, of any type of whole numbers.
        seed: of the basis in which the embeddings are written down.
    """
    if model.lm_head.weight.is_meta:  # its shape alone is wanted
        return
    with _one_thread():
        pairs = _Pairs.count(tokens.astype(np.int64), model.vocab_size)
        generator = torch.Generator().manual_seed(seed)
        embeddings = _embeddings(pairs, model.config.hidden_size, generator)
        model.model.embed_tokens.weight.copy_(_SCALE * embeddings)  # the last norm takes the scale away
        model.lm_head.weight.copy_(_output_layer(pairs, embeddings))


@dataclass(frozen=True)
class _Pairs:
    """What follows what: the matrix S, `(V, V)`, and how often tokens come."""

    following: _SparseRows
    """S."""
    preceding: _SparseRows
    """S, transposed."""
    frequency: Tensor
    """Of each token as the first of a pair, `(V,)`; sums to 1."""
    log_frequency: Tensor
    """Logarithm of that as the second of a pair."""

    @classmethod
    def count(cls, tokens: NDArray[np.int64], vocab_size: int) -> _Pairs:
        pairs, counts = _counted(tokens[:-1] * vocab_size + tokens[1:], vocab_size**2)
        first, second = pairs // vocab_size, pairs % vocab_size
        # Half a time more than seen: of what never came no logarithm is infinite.
        firsts, seconds = (np.bincount(i, counts, vocab_size) + 0.5 for i in (first, second))
        kinds = np.bincount(first, minlength=vocab_size)
        probability = seconds / seconds.sum()
        values = np.log1p(counts / (kinds[first] * probability[second]))
        by_second = np.argsort(second, kind="stable")
        return cls(
            _SparseRows.of(first, second, values, vocab_size),
            _SparseRows.of(second[by_second], first[by_second], values[by_second], vocab_size),
            torch.from_numpy(firsts / firsts.sum()).float(),
            torch.from_numpy(np.log(probability)).float(),
        )


def _counted(numbers: NDArray[np.int64], below: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the numbers that come, ascending, and how often each does."""
    if below > _TABLE:
        return np.unique(numbers, return_counts=True)
    counts = np.bincount(numbers)  # without sorting: a fraction of the time
    came = np.flatnonzero(counts)
    return came, counts[came]


@dataclass(frozen=True)
class _SparseRows:
    """A matrix `(V, V)`, most of which is zero."""

    columns: Tensor
    """Of all entries, int64 `(n,)`, row after row."""
    starts: Tensor
    """Of each row among the entries, int64 `(V,)`."""
    values: Tensor
    """Of the entries, `(n,)`."""

    @classmethod
    def of(
        cls, rows: NDArray[np.int64], columns: NDArray[np.int64], values: NDArray[np.float64], size: int
    ) -> _SparseRows:
        starts = np.searchsorted(rows, np.arange(size))
        return cls(torch.from_numpy(columns), torch.from_numpy(starts), torch.from_numpy(values).float())

    def __matmul__(self, other: Tensor) -> Tensor:
        """Return the product with `(V, k)`."""
        return F.embedding_bag(self.columns, other, self.starts, mode="sum", per_sample_weights=self.values)


def _embeddings(pairs: _Pairs, channels: int, generator: torch.Generator) -> Tensor:
    """Return `(V, C)`: directions of S, one channel of a constant, and a rotation that makes all channels alike."""
    vocab_size = len(pairs.frequency)
    weight = pairs.frequency.sqrt()[:, None]
    most = min(channels - 1, vocab_size, _MOST_DIRECTIONS)
    image = torch.randn(vocab_size, min(vocab_size, most + _OVERSAMPLING), generator=generator)
    for _ in range(_ITERATIONS + 1):
        basis = torch.linalg.qr(weight * (pairs.following @ image)).Q  # (V, k)
        image = pairs.preceding @ (weight * basis)  # (V, k): the transposed matrix on the basis
    squares, left = _eigen(image.T @ image)  # of singular values, ascending; (k,) and (k, k)
    rows = (basis @ left[:, -most:]) * squares[-most:] ** 0.25 / weight
    rows = F.normalize(rows, dim=1)
    is_new = rows.norm(dim=1) < 0.5  # nothing ever followed them
    rows[is_new] = F.normalize(torch.randn(int(is_new.sum()), most, generator=generator), dim=1)
    rows = torch.cat((rows, torch.full((vocab_size, 1), _CONSTANT)), 1)
    rotation = torch.linalg.qr(torch.randn(channels, channels, generator=generator)).Q
    embeddings: Tensor = channels**0.5 * F.normalize(rows @ rotation[: most + 1], dim=1)
    return embeddings


def _eigen(square: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues, ascending, and eigenvectors of a `(k, k)` that has none below 0.

    Of a few different tokens most are 0, for which LAPACK's fp32 finds no end, or nan: there it is fp64, what is
    rounding becomes 0. Not everywhere: each run since this start is there would begin elsewhere, by rounding alone.
    """
    with contextlib.suppress(torch.linalg.LinAlgError):  # type: ignore[attr-defined]
        values, vectors = torch.linalg.eigh(square)
        if bool(values.isfinite().all() and vectors.isfinite().all()):
            return values.clamp(min=0), vectors
    values, vectors = torch.linalg.eigh(square.double())
    values = values.where(values > _ROUNDING * values[-1], 0)
    return values.to(square.dtype), vectors.to(square.dtype)


def _output_layer(pairs: _Pairs, embeddings: Tensor) -> Tensor:
    """Return the `(V, C)` whose products with the embeddings are nearest to the logits, weighted by frequency."""
    weighted = embeddings * pairs.frequency[:, None]
    square = embeddings.T @ weighted
    square.diagonal().add_(_RIDGE * square.diagonal().mean())
    centred = pairs.log_frequency - pairs.log_frequency.mean()
    wanted = pairs.preceding @ weighted + torch.outer(centred, weighted.sum(0))  # (V, C)
    layer: Tensor = torch.linalg.solve(square, wanted.T).T
    return layer


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Have torch compute in one thread: how a sum is divided among several changes its last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
