"""One checkpoint: written whole, read back, verified when it is loaded. Nothing in it can run code.

model.safetensors   weights, by parameter name
state.pt            everything else; loads with `weights_only=True`
manifest.json       format version, step, samples, world size, hashes of the two, and a checksum of its own
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hvdtrain.errors import CheckpointError
from hvdtrain.rundir.manifest import MANIFEST, STATE, WEIGHTS, Manifest, encode_manifest, read_manifest, regular_file
from hvdtrain.settings.files import sha256_of


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and verified."""

    manifest: Manifest
    weights: dict[str, Tensor]
    state: dict[str, Any]


def are_finite(weights: Mapping[str, Tensor], parameters: frozenset[str]) -> bool:
    """Tell whether all parameters are finite numbers. Buffers may hold infinities on purpose, as masks do."""
    return all(_is_finite(weights[name]) for name in parameters & weights.keys())


def _is_finite(tensor: Tensor) -> bool:
    if tensor.is_floating_point() and tensor.itemsize == 1:  # torch does not ask 8-bit numbers
        tensor = tensor.float()
    return bool(tensor.isfinite().all())


def write_checkpoint(folder: Path, manifest: Manifest, weights: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write the files of a checkpoint to an empty folder and flush them to disk."""
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / WEIGHTS)
    torch.save(dict(state), folder / STATE)
    hashes = {name: _flush_and_hash(folder / name) for name in (WEIGHTS, STATE)}
    write_text(folder / MANIFEST, encode_manifest(dataclasses.replace(manifest, sha256=hashes)))
    # safetensors makes files that only their owner can read; all follow the user's umask, as the manifest does.
    mode = (folder / MANIFEST).stat().st_mode & 0o777
    for name in (WEIGHTS, STATE):
        (folder / name).chmod(mode)
    flush_folder(folder)


def read_back(folder: Path, weights: Mapping[str, Tensor], is_whole: bool) -> None:
    """Read a checkpoint that was just written by the rules of loading.

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
            _verify(folder, manifest)
        with safe_open(regular_file(folder / WEIGHTS), "pt") as file:
            names = set(file.keys())
            if names != weights.keys():
                raise CheckpointError(f"{folder / WEIGHTS} holds other names than were saved")
            for name in names:
                if file.get_slice(name).get_shape() != [*weights[name].shape] or (
                    is_whole and not _same_bytes(file.get_tensor(name), weights[name])
                ):
                    raise CheckpointError(f"{folder / WEIGHTS} does not hold {name} as it was saved")
        # Mapped: structure and numbers are read, the tensors' bytes are not.
        torch.load(regular_file(folder / STATE), map_location="cpu", weights_only=True, mmap=True)
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
        return Checkpoint(manifest, weights, _load_state(path))


def verify_checkpoint(path: Path) -> None:
    """Make sure that a checkpoint loads; its tensors are read for their hash, and take no memory.

    Raises:
        CheckpointError: as `load_checkpoint`.
    """
    manifest = read_manifest(path)
    with _in_a_sentence(path):
        _verify(path, manifest)
        _load_state(path, is_mapped=True)


@contextlib.contextmanager
def _in_a_sentence(path: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # of many types: what torch raises for a file depends on where it is odd
        raise CheckpointError(f"checkpoint {path} cannot be read: {_reason(error)}") from error


def _load_state(path: Path, is_mapped: bool = False) -> dict[str, Any]:
    state = torch.load(path / STATE, map_location="cpu", weights_only=True, mmap=is_mapped)
    if not isinstance(state, dict):
        raise CheckpointError(f"checkpoint {path} cannot be read: {STATE} holds no dictionary")
    return state


def _verify(path: Path, manifest: Manifest) -> None:
    # First what takes no time, whatever size a file pretends to have: a header says how long the weights' is, and an
    # archive has its directory at the end.
    try:
        safe_open(regular_file(path / WEIGHTS), "pt")
    except SafetensorError as error:
        raise CheckpointError(f"{path / WEIGHTS} is damaged: {_reason(error)}") from error
    if not zipfile.is_zipfile(regular_file(path / STATE)):
        raise CheckpointError(f"{path / STATE} is damaged: it is cut short, or something else")
    for name, expected in manifest.sha256.items():
        if sha256_of(regular_file(path / name)) != expected:
            raise CheckpointError(f"{path / name} is damaged: its SHA-256 is not the one in {MANIFEST}")


def _same_bytes(one: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors are the same bit for bit: numbers that are not finite equal themselves, too."""
    one, other = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(one, other)


def _reason(error: Exception) -> str:
    """Return what happened in one line."""
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def write_text(path: Path, text: str) -> None:
    """Write a file and flush it to disk."""
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _flush_and_hash(path: Path) -> str:
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return sha256_of(path)


def flush_folder(path: Path) -> None:
    """Make renames in a folder durable; some file systems refuse, which is no error."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)
