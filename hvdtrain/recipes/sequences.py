"""What the recipes of sequences of many lengths share: `seq2seq` and `ctc`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hvdtrain.data.samplers import ByLength
from hvdtrain.data.text.pair_samples import FirstSamples
from hvdtrain.settings import TrainConfig

_TRIED = 4


def by_length(lengths: NDArray[np.int64], train: TrainConfig) -> ByLength:
    """Return the order in which samples of these lengths are trained, a global batch of about one length."""
    batch = train.global_batch_size or (train.micro_batch_size or 1) * (train.accum_steps or 1)
    return ByLength(lengths, batch)


def shortest(lengths: NDArray[np.int64]) -> Tensor:
    """Return a few samples to try a model on, the shortest and one of middle length, which make for padding."""
    order = torch.from_numpy(lengths).argsort(stable=True)
    return torch.unique(torch.cat((order[: _TRIED - 1], order[len(order) // 2 :][:1])))  # type: ignore[no-any-return]


def first_of(data: Any, asked: int | None) -> Any:
    """Return the first `asked` samples of a data set, or all; None where there are none."""
    count = len(data) if asked is None else min(asked, len(data))
    if count == 0:
        return None
    return data if count == len(data) else FirstSamples(data, count)


def spread(count: int) -> Tensor:
    """Return a few of so many samples, int64 `(n,)`, from the first to the last."""
    return torch.from_numpy(np.linspace(0, count - 1, min(_TRIED, count)).astype(np.int64))


def shown(title: str, given: Sequence[str], made: Sequence[str]) -> str:
    """Return what a model has made of samples, to be shown at the end of a run."""
    pairs = [f"  {one}\n    {other}" for one, other in zip(given, made, strict=True)]
    return "\n".join([title, *pairs])
