"""Values from a user's code, converted or refused where they enter: counts, metrics, and what a checkpoint holds.

A checkpoint is loaded with `weights_only=True`, which knows tensors and plain values. One numpy number in it, from a
count or a learning rate, and it could not be read again.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from hvdtrain.data.dataset import Dataset
from hvdtrain.errors import ConfigError
from hvdtrain.trainer.component import Totals
from hvdtrain.world import World

_PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)


def count_targets(data: Dataset, samples: Tensor) -> int:
    """Return `data.num_targets(samples)` as an int: `samples` is int64 `(n,)`.

    Raises:
        ConfigError: it is no number of targets.
    """
    count: Any = data.num_targets(samples)
    if type(count) is int and count >= 0:
        return count
    size = count.numel() if isinstance(count, Tensor) else getattr(count, "size", None)
    value: Any = count.item() if size == 1 else count  # of numpy or torch
    is_whole = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_whole or value != int(value) or value < 0:
        raise ConfigError(
            f"num_targets() of {type(data).__name__} returned {count!r}: it must return how many terms the loss of"
            " these samples sums over, a whole number"
        )
    return int(value)


def as_sums(values: Any, reduction: str, data: Any, samples: Tensor) -> dict[str, Tensor]:
    """Return what `loss_sums` returned as sums over the targets of `samples`, int64 `(n,)`, whatever it promises.

    Raises:
        ConfigError: `num_targets` returned no number of targets.
    """
    if reduction == "sum" or not isinstance(values, Mapping):
        return cast("dict[str, Tensor]", values)
    count = count_targets(data, samples)
    # The mean over nothing is nan, and its sum is none.
    return {
        name: value * count if count else torch.zeros_like(torch.as_tensor(value)) for name, value in values.items()
    }


def no_totals(names: Sequence[str], world: World) -> Totals:
    """Return zeros for the metrics of these names."""
    if world.reads_at_once:
        return [0.0] * len(names)
    return torch.zeros(len(names), dtype=torch.float64, device=world.device)


def added(one: Totals, other: Totals) -> Totals:
    """Return the sums of two, both of the same kind."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return torch.as_tensor(one, dtype=torch.float64) + torch.as_tensor(other, dtype=torch.float64)
    return [a + b for a, b in zip(one, other, strict=True)]


def as_totals(sums: Mapping[str, Any], names: Sequence[str], world: World) -> Totals:
    """Return the entries of what `loss_sums` returned that have these names, bitwise as `as_sum` has them.

    Raises:
        ConfigError: one is no single number.
    """
    if world.reads_at_once:
        return [_as_number(sums[name], name, world.device) for name in names]
    return torch.stack([as_sum(sums[name], name, world.device) for name in names])


def _as_number(value: Any, name: str, device: torch.device) -> float:
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        return float(value.item())
    return float(as_sum(value, name, device))


def as_sum(value: Any, name: str, device: torch.device) -> Tensor:
    """Return one entry of what `loss_sums` returned as a float64 scalar on the device.

    Raises:
        ConfigError: it is no single number.
    """
    try:
        tensor = torch.as_tensor(value).to(device, non_blocking=device.type == "cuda").detach().double()
    except (TypeError, ValueError, RuntimeError):
        tensor = None
    if tensor is None or tensor.numel() != 1:
        what = f"a tensor of shape {tuple(tensor.shape)}" if tensor is not None else f"a {type(value).__name__}"
        raise ConfigError(f"loss_sums() returned {what} as '{name}': it must be one number, a sum over targets")
    return tensor.reshape(())


def as_figure(value: Any, name: str) -> float:
    """Return a metric as a float.

    Raises:
        ConfigError: it is no single number.
    """
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"the metric '{name}' is {value!r}: it must be one number") from error


def storable(value: Any, where: str, copy_tensor: Any = lambda tensor: tensor) -> Any:
    """Return nested values as a checkpoint can hold them; numpy's numbers become Python's.

    Args:
        value: tensors and plain values, nested in mappings, lists and tuples.
        where: what it is, for the message.
        copy_tensor: is given each tensor and returns what is to stand in its place.

    Raises:
        ConfigError: a value that could not be loaded again; says where it is.
    """
    if isinstance(value, Tensor):
        return copy_tensor(value)
    if isinstance(value, np.generic):
        return storable(value.item(), where, copy_tensor)
    if isinstance(value, Mapping):
        return {
            storable(key, f"a key of {where}"): storable(item, f"{where}[{key!r}]", copy_tensor)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        items = [storable(item, f"{where}[{i}]", copy_tensor) for i, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    if not isinstance(value, _PLAIN) or isinstance(value, enum.Enum):
        raise ConfigError(
            f"{where} is of type {type(value).__name__}, which a checkpoint cannot hold: use tensors, numbers, strings"
            " and None, in dicts, lists and tuples"
        )
    return value
