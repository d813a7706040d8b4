"""One checkpoint: written whole, read back, verified when it is loaded. Nothing in it can run code.

model.safetensors   weights, by parameter name
state.pt            everything else; loads with `weights_only=True`
state-rank-000.pt   and so on, of each rank, where all ranks have written: what is its own (see `parts`)
manifest.json       format version, step, samples, world size, hashes of the others, and a checksum of its own
"""

from __future__ import annotations

import contextlib
import dataclasses
import zipfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hvdtrain.errors import CheckpointError
from hvdtrain.rundir.joined import check_parts, joined
from hvdtrain.rundir.manifest import (
    DIVIDED_FORMAT,
    MANIFEST,
    STATE,
    WEIGHTS,
    Manifest,
    encode_manifest,
    part_name,
    read_manifest,
    regular_file,
)
from hvdtrain.rundir.parts import Receipts
from hvdtrain.settings.files import flush_folder, flushed_sha256, sha256_of, telling_why, write_flushed

_COMMON = (WEIGHTS, STATE)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and verified."""

    manifest: Manifest
    weights: dict[str, Tensor]
    state: dict[str, Any]
    """As one rank would have saved it, whoever has."""


def are_finite(weights: Mapping[str, Tensor], parameters: frozenset[str]) -> bool:
    """Tell whether all parameters are finite numbers. Buffers may hold infinities on purpose, as masks do."""
    return all(_is_finite(weights[name]) for name in parameters & weights.keys())


def _is_finite(tensor: Tensor) -> bool:
    if tensor.is_floating_point() and tensor.itemsize == 1:  # torch does not ask 8-bit numbers
        tensor = tensor.float()
    return bool(tensor.isfinite().all())


def write_checkpoint(
    folder: Path,
    manifest: Manifest,
    weights: Mapping[str, Tensor],
    state: Mapping[str, Any],
    receipts: Receipts | None = None,
) -> None:
    """Write the files of a checkpoint to an empty folder and flush them to disk.

    With `receipts`, all ranks write their parts to it meanwhile: the manifest comes when these are there.
    """
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / WEIGHTS)
    with telling_why(folder / STATE):
        torch.save(dict(state), folder / STATE)
    hashes = {name: flushed_sha256(folder / name) for name in _COMMON}
    if receipts is not None:
        sizes = {name: (folder / name).stat().st_size for name in _COMMON}
        parts = receipts.wait()
        receipts.clear()
        hashes |= {name: receipt.sha256 for name, receipt in parts.items()}
        sizes |= {name: receipt.num_bytes for name, receipt in parts.items()}
        manifest = dataclasses.replace(manifest, sizes=sizes, format_version=DIVIDED_FORMAT)
    write_flushed(folder / MANIFEST, encode_manifest(dataclasses.replace(manifest, sha256=hashes)))
    # safetensors makes files that only their owner can read; all follow the user's umask, as the manifest does.
    mode = (folder / MANIFEST).stat().st_mode & 0o777
    for name in _COMMON:
        (folder / name).chmod(mode)
    flush_folder(folder)


def read_back(folder: Path, weights: Mapping[str, Tensor], is_whole: bool) -> None:
    """Read what rank 0 has just written of a checkpoint by the rules of loading; each rank has read its own part.

    Args:
        folder: where it is.
        weights: what must be in it.
        is_whole: read every byte, and compare the weights; otherwise names and shapes, and what is small.

    Raises:
        CheckpointError: it would not load, or holds something else.
    """
    manifest = read_manifest(folder)
    try:
        if is_whole:
            _verify(folder, manifest, _COMMON)
        with safe_open(regular_file(folder / WEIGHTS), "pt") as file:
            names = set(file.keys())
            if names != weights.keys():
                raise CheckpointError(f"{folder / WEIGHTS} holds other names than were saved")
            for name in names:
                if file.get_slice(name).get_shape() != [*weights[name].shape] or (
                    is_whole and not _same_bytes(file.get_tensor(name), weights[name])
                ):
                    raise CheckpointError(f"{folder / WEIGHTS} does not hold {name} as it was saved")
        _load_state(folder, manifest, is_mapped=True)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"it does not load again: {_reason(error)}") from error


def load_checkpoint(path: Path, *, is_verified: bool = False) -> Checkpoint:
    """Read a checkpoint to host memory and verify it against its manifest.

    Args:
        path: its folder.
        is_verified: it was, a moment ago.

    Raises:
        CheckpointError: a file is missing, damaged, or of a newer format; names the file.
    """
    manifest = read_manifest(path)
    with _in_a_sentence(path):
        if not is_verified:
            _verify(path, manifest)
        weights = safetensors.torch.load_file(path / WEIGHTS)
        state, parts = _load_state(path, manifest)
        return Checkpoint(manifest, weights, joined(state, parts) if parts else state)


def load_outline(path: Path) -> dict[str, Any]:
    """Return what `state.pt` of a checkpoint that was verified holds; its tensors stay on disk until they are used.

    Raises:
        CheckpointError: as `load_checkpoint`.
    """
    with _in_a_sentence(path):
        return _load_state(path, read_manifest(path), is_mapped=True)[0]


def verify_checkpoint(path: Path) -> None:
    """Make sure that a checkpoint loads; its tensors are read for their hash, and take no memory.

    Raises:
        CheckpointError: as `load_checkpoint`.
    """
    manifest = read_manifest(path)
    with _in_a_sentence(path):
        _verify(path, manifest)
        _load_state(path, manifest, is_mapped=True)


@contextlib.contextmanager
def _in_a_sentence(path: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # of many types: what torch raises for a file depends on where it is odd
        raise CheckpointError(f"checkpoint {path} cannot be read: {_reason(error)}") from error


def _load_state(path: Path, manifest: Manifest, is_mapped: bool = False) -> tuple[dict[str, Any], list[Any]]:
    """Return what `state.pt` holds, and the ranks' parts, which fit it; none where rank 0 has written all.

    Mapped, structure and numbers are read, and the tensors' bytes when they are used: parts always are, since they are
    copied when they are put together.
    """
    state = _loaded(path / STATE, is_mapped)
    if not isinstance(state, dict):
        raise CheckpointError(f"checkpoint {path} cannot be read: {STATE} holds no dictionary")
    if not manifest.is_divided:
        return state, []
    parts = [_loaded(path / part_name(rank), True) for rank in range(manifest.world_size)]
    try:
        check_parts(state, parts, manifest.step)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {_reason(error)}") from error
    return state, parts


def _loaded(path: Path, is_mapped: bool) -> Any:
    return torch.load(regular_file(path), map_location="cpu", weights_only=True, mmap=is_mapped)


def _verify(path: Path, manifest: Manifest, names: Collection[str] = ()) -> None:
    """Make sure that files are those of the manifest; all of them, unless names are given."""
    names = names or manifest.sha256.keys()
    # First what takes no time, whatever size a file pretends to have: a header says how long the weights' is, and an
    # archive has its directory at the end.
    for name, size in (manifest.sizes or {}).items():
        found = regular_file(path / name).stat().st_size if name in names else size
        if found != size:
            raise CheckpointError(f"{path / name} is damaged: it has {found:,} bytes, and was saved with {size:,}")
    try:
        safe_open(regular_file(path / WEIGHTS), "pt")
    except SafetensorError as error:
        raise CheckpointError(f"{path / WEIGHTS} is damaged: {_reason(error)}") from error
    for name in names:
        if name != WEIGHTS and not zipfile.is_zipfile(regular_file(path / name)):
            raise CheckpointError(f"{path / name} is damaged: it is cut short, or something else")
    for name in names:
        if sha256_of(regular_file(path / name)) != manifest.sha256[name]:
            raise CheckpointError(f"{path / name} is damaged: its SHA-256 is not the one in {MANIFEST}")


def _same_bytes(one: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors are the same bit for bit: numbers that are not finite equal themselves, too."""
    one, other = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(one, other)


def _reason(error: Exception) -> str:
    """Return what happened in one line."""
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
