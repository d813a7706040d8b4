"""What tells two data sets apart: how long they are, what they say of themselves, and a few of their samples."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hvdtrain.data.dataset import Dataset
from hvdtrain.data.nested import fields_of
from hvdtrain.data.readers import read_samples
from hvdtrain.data.text.windows import WithStarts

_SAMPLES = 8

Fingerprint = dict[str, Any]
"""`length`; `fingerprint`, that of the data set's own method of this name; `samples`, a digest of some of them."""
_NONE = {"length": 0, "fingerprint": "", "samples": ""}
_PARTS = ("length", "fingerprint", "samples")


def fingerprint_of(data: Dataset) -> Fingerprint:
    """Return what data is known by: of a stream, which cannot be looked into without reading it, only its length."""
    if isinstance(data, WithStarts):  # where documents begin is read along for a GPU: the data is the same without
        data = data.samples
    own = getattr(data, "fingerprint", None)
    is_stream = getattr(data, "is_sequential", False)
    return {
        "length": len(data),
        "fingerprint": str(own()) if callable(own) else "",
        "samples": "" if is_stream else _digest(data),
    }


def explain_ranks(fingerprints: Sequence[Mapping[str, Fingerprint]]) -> str | None:
    """Return in one sentence how the ranks' data differs, naming the ranks in the minority; None where it does not.

    Args:
        fingerprints: of each rank, by the name of what the data is for.
    """
    for name in fingerprints[0]:
        for part in _PARTS:
            values = [own.get(name, _NONE)[part] for own in fingerprints]
            if len(set(values)) > 1:
                return _explain(name, part, values)
    return None


def _explain(name: str, part: str, values: Sequence[Any]) -> str:
    usual = max(values, key=lambda value: (values.count(value), value == values[0]))
    others = [rank for rank, value in enumerate(values) if value != usual]
    ranks = f"rank {', '.join(map(str, others))}"
    what = "other samples than the others"
    if part == "length":
        what = f"{', '.join(f'{values[rank]:,}' for rank in others)} samples, and the others {usual:,}"
    return (
        f"the {name} data is not the same on all ranks: {ranks} {'has' if len(others) == 1 else 'have'} {what}."
        " Look for a split or a choice of samples without a fixed seed, the order of a set or of a directory listing,"
        " or files that are not the same on all hosts"
    )


def explain_change(then: Mapping[str, Fingerprint], now: Mapping[str, Fingerprint]) -> str | None:
    """Return what has changed in the data since `then`; None where nothing has."""
    for name in then.keys() & now.keys():
        before, after = then[name], now[name]
        if before["length"] != after["length"]:
            return f"the {name} data had {before['length']:,} samples and has {after['length']:,} now"
        if before != after:
            return f"the {name} data is not the same: other samples"
    return None


def _digest(data: Dataset) -> str:
    """Return a hash of a few samples, from the first to the last, as they are read in epoch 0 with seed 0."""
    digest = hashlib.blake2b(digest_size=16)
    count = min(_SAMPLES, len(data))
    for i in range(count):
        sample = torch.tensor([i * (len(data) - 1) // max(1, count - 1)])
        _add(digest, read_samples(data, sample))
    return digest.hexdigest()


def _add(digest: Any, value: Any) -> None:
    """Hash a batch: tensors by their bits, numbers and text as they are written, other things by their type."""
    if isinstance(value, Tensor):
        _add_tensor(digest, value)
    elif isinstance(value, Mapping) or fields_of(value):
        for key, item in (value if isinstance(value, Mapping) else fields_of(value)).items():
            digest.update(f"{key}:".encode())
            _add(digest, item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _add(digest, item)
    else:
        digest.update((repr(value) if isinstance(value, (bool, int, float, str, bytes)) else str(type(value))).encode())


def _add_tensor(digest: Any, tensor: Tensor) -> None:
    shape = () if tensor.is_nested else tuple(tensor.shape)
    digest.update(f"{tensor.dtype} {shape}".encode())
    for part in _parts(tensor.detach().cpu()):
        plain = part.resolve_conj().resolve_neg().contiguous()
        digest.update(plain.view(-1).view(torch.uint8).numpy().tobytes())


def _parts(tensor: Tensor) -> Sequence[Tensor]:
    """Return tensors with memory of their own that hold what this one does."""
    if tensor.layout == torch.sparse_coo:
        tensor = tensor.coalesce()
        return tensor.indices(), tensor.values()
    if tensor.is_nested:
        return [*tensor.unbind()]
    if tensor.layout != torch.strided:
        return [tensor.to_dense()]
    return [tensor.int_repr() if tensor.is_quantized else tensor]
