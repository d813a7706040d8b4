"""Are the ranks bitwise equal? A digest of each tensor, computed where it lies, and the first that differs."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hvdtrain.errors import ConfigError, UsageError
from hvdtrain.models.walk import first_lazy

_log = logging.getLogger("hvdtrain")

_PER_RANK = "_hvdtrain_per_rank_buffers"
# Elements at a time: on CPUs what stays in their cache, on GPUs what keeps them busy. The digest is the same.
_CHUNKS = {False: 1 << 18, True: 1 << 24}
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def tensor_digest(tensor: Tensor) -> int:
    """Return 64 bits of a tensor's bits and their places, as `digest_of` does."""
    return int(digest_of(tensor))


def digest_of(tensor: Tensor) -> Tensor:
    """Return 64 bits, an int64 scalar on its device, of a tensor's bits and their places; alike on every device.

    Each element, as an integer, is multiplied by an odd number that depends on its place, and all are added modulo
    2^64: a change of any one element changes the result.
    """
    if tensor.layout != torch.strided:
        return _digest_of_parts(tensor.detach())
    flat = tensor.detach().contiguous().view(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).view(-1)
    bits = flat.view(_INTEGERS[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    length = _CHUNKS[tensor.is_cuda]
    for start in range(0, len(bits), length):
        chunk = bits[start : start + length].to(torch.int64)
        # An odd multiplier for each place, from the odd constant of SplitMix64 (2^64 / golden ratio).
        places = torch.arange(start, start + len(chunk), device=tensor.device)
        total += places.mul_(-7046029254386353131).bitwise_or_(1).mul_(chunk).sum()
    return total


def _digest_of_parts(tensor: Tensor) -> Tensor:
    """Return the same of a sparse tensor: of the places that it names, and of what stands there."""
    entries: Tensor = tensor if tensor.layout == torch.sparse_coo else tensor.to_sparse()
    entries = entries.coalesce()
    return digest_of(torch.stack([digest_of(entries.indices()), digest_of(entries.values())]))


def all_in_one(digests: Sequence[Tensor]) -> Tensor:
    """Return one digest, int64 `(1,)` in host memory, of many and their order."""
    if not digests:
        return torch.zeros(1, dtype=torch.int64)
    # Of an optimizer some may lie in host memory: counters, or what was moved there.
    home = next((digest.device for digest in digests if digest.device.type != "cpu"), digests[0].device)
    return digest_of(torch.stack([digest.to(home) for digest in digests])).cpu().view(1)


def first_difference(digests: Sequence[Mapping[str, int]]) -> tuple[str, list[int]] | None:
    """Return the first name whose digest is not alike on all ranks, and the ranks that are not with the majority.

    Where no majority is, rank 0 is taken to be right.
    """
    for name in digests[0]:
        values = [own.get(name) for own in digests]
        if len(set(values)) > 1:
            right = max(values, key=lambda value: (values.count(value), value == values[0]))
            return name, [rank for rank, value in enumerate(values) if value != right]
    return None


def keep_per_rank(module: nn.Module, *names: str) -> None:
    """Leave buffers of `module` to each rank: they are not averaged, and need not be equal.

    For what a rank collects for itself, such as a queue of keys (arXiv:1911.05722). All ranks begin with rank 0's, and
    a checkpoint holds rank 0's.

    Raises:
        UsageError: there is no such buffer.

    Example:
        >>> module = nn.Module()
        >>> module.register_buffer("queue", torch.zeros(128, 4096))
        >>> keep_per_rank(module, "queue")
    """
    own = dict(module.named_buffers(recurse=False))
    missing = [name for name in names if name not in own]
    if missing:
        raise UsageError(f"there is no buffer {missing[0]!r} in this {type(module).__name__}: it has {list(own)}")
    module.__dict__[_PER_RANK] = {*module.__dict__.get(_PER_RANK, ()), *names}


def per_rank_buffers(model: nn.Module) -> set[str]:
    """Return the names of the buffers that `keep_per_rank` was told of."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in module.__dict__.get(_PER_RANK, ())
    }


def check_module(model: Any, call: str) -> None:
    """Raise UsageError where something else than a module is given in `call`, or one without shapes as yet."""
    if not isinstance(model, nn.Module):
        several = isinstance(model, list | tuple) and all(isinstance(item, nn.Module) for item in model)
        what = "several modules are one as torch.nn.ModuleList([...])" if several else "give the torch.nn.Module itself"
        raise UsageError(f"{call} was given an object of type {type(model).__name__} as the model: {what}")
    lazy = first_lazy(model)
    if lazy:
        raise UsageError(f"{call} was given a model whose {lazy} has no shape yet: run it once, on one batch, before")


def check_forward_pass(model: nn.Module, warns: bool = True) -> None:
    """Make sure that a forward pass leaves the weights alone: each rank would change them by its own samples.

    What makes a gradient depend on the rank's own samples as a whole is said, if it `warns`.

    Raises:
        ConfigError: it does not; names the layer.
    """
    for name, module in model.named_modules():
        if warns and getattr(module, "scale_grad_by_freq", None) is True:
            _log.warning(
                "%s(scale_grad_by_freq=True) %s divides by how often a rank's own micro-batch has each row, and not the"
                " whole batch: on another number of ranks it learns otherwise",
                type(module).__name__,
                name,
            )
        # Not `module.weight`: one that is parametrized is computed, and may change, whenever it is looked at.
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        if getattr(module, "max_norm", None) is not None and weight is not None and weight.requires_grad:
            layer = f"{type(module).__name__}(max_norm={module.max_norm:g}) {name}".rstrip()
            raise ConfigError(
                f"{layer} shortens its rows in the forward pass, on each rank those of its own samples: leave max_norm"
                " out, and shorten all after each step (under torch.no_grad(), weight.renorm_(2, 0, max_norm))"
            )
