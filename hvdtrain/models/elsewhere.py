"""Weights that are read from elsewhere whenever a model is built, and never change: neither saved nor sent.

Beside adapters (LoRA) the base model is such: its file is its only copy. `state_dict()` leaves these weights out, and
`load_state_dict()` does not miss them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from hvdtrain.errors import ConfigError

_MARK = "_hvdtrain_kept_elsewhere"
_CHUNK = 1 << 24


def keep_elsewhere(model: nn.Module) -> None:
    """Leave the parameters of `model` that are frozen now out of its state, for good.

    What is trainable, and buffers, stay in it.
    """
    named = model.named_parameters(remove_duplicate=False)
    vars(model)[_MARK] = frozenset(name for name, parameter in named if not parameter.requires_grad)
    whole: Any = model
    whole.register_state_dict_post_hook(_leave_out)
    whole.register_load_state_dict_post_hook(_do_not_miss)


def kept_elsewhere(model: nn.Module) -> frozenset[str]:
    """Return the names of the parameters, tied ones by all their names, that `keep_elsewhere` has left out."""
    names: frozenset[str] = vars(model).get(_MARK, frozenset())
    return names


def weights_digest(model: nn.Module) -> str:
    """Return the SHA-256 of all parameters, their names, types and shapes, as hexadecimal digits.

    Tied ones count by all their names. Computed by several threads.
    """
    named = sorted(model.named_parameters(remove_duplicate=False), key=lambda item: item[0])
    distinct = list({id(parameter): parameter for _, parameter in named}.values())
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
        digests = dict(zip(map(id, distinct), pool.map(_digest, distinct), strict=True))
    lines = [f"{name} {p.dtype} {tuple(p.shape)} {digests[id(p)]}" for name, p in named]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _digest(tensor: Tensor) -> str:
    digest = hashlib.sha256()
    for part in _bytes(tensor):
        digest.update(part)
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> Iterator[Any]:
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    for start in range(0, len(flat), _CHUNK):
        yield flat[start : start + _CHUNK].cpu().numpy()


def _leave_out(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Take the weights out of a `state_dict()`.

    Raises:
        ConfigError: one of them is trained now, and would be lost.
    """
    names = kept_elsewhere(module)
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and name in names:
            raise ConfigError(
                f"{name} was unfrozen, and is in no checkpoint of this run: beside adapters the base model stays frozen"
            )
    for name in names:
        state.pop(prefix + name, None)


def _do_not_miss(module: nn.Module, keys: Any) -> None:
    """Have `load_state_dict` take a state without them; they stay as they are."""
    names = kept_elsewhere(module)
    keys.missing_keys[:] = [key for key in keys.missing_keys if key not in names]
