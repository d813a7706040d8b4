"""One checkpoint: written whole, verified when it is read. Nothing in it can run code.

model.safetensors   weights, by parameter name
state.pt            everything else; loads with `weights_only=True`
manifest.json       format version, step, samples, world size, file hashes
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from hvdtrain.errors import CheckpointError

FORMAT_VERSION = 2
WEIGHTS, STATE, MANIFEST = "model.safetensors", "state.pt", "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself."""

    step: int
    """Optimizer steps completed."""
    samples: int
    """Samples that these steps have seen, of all ranks."""
    world_size: int
    sha256: dict[str, str] = field(default_factory=dict)
    """Of each file; filled in when they are written."""
    val_loss: float | None = None
    """Held-out loss of these weights, if they were evaluated when they were saved."""
    global_batch_size: int | None = None
    micro_batch_size: int | None = None
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and verified."""

    manifest: Manifest
    weights: dict[str, Tensor]
    state: dict[str, Any]


def write_checkpoint(folder: Path, manifest: Manifest, weights: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write the files of a checkpoint to an empty folder and flush them to disk.

    Raises:
        CheckpointError: they could not be written.
    """
    try:
        safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / WEIGHTS)
        torch.save(dict(state), folder / STATE)
        hashes = {name: _flush_and_hash(folder / name) for name in (WEIGHTS, STATE)}
        manifest = dataclasses.replace(manifest, sha256=hashes)
        write_text(folder / MANIFEST, json.dumps(dataclasses.asdict(manifest), indent=2) + "\n")
        flush_folder(folder)
    except (OSError, SafetensorError, RuntimeError) as error:  # torch and safetensors have their own for a full disk
        raise CheckpointError(str(error)) from error


def read_manifest(path: Path) -> Manifest:
    """Read what a checkpoint says of itself.

    Raises:
        CheckpointError: it is missing, damaged, or of a newer format.
    """
    with _reading(path):
        manifest = Manifest(**json.loads((path / MANIFEST).read_text()))
        if manifest.format_version > FORMAT_VERSION:
            raise CheckpointError(f"{path} was written by a newer hvdtrain (format {manifest.format_version}): update")
        return manifest


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint to host memory and verify it against its manifest.

    Raises:
        CheckpointError: a file is missing, damaged, or of a newer format; names the file.
    """
    manifest = read_manifest(path)
    with _reading(path):
        for name, expected in manifest.sha256.items():
            if _hash(path / name) != expected:
                raise CheckpointError(f"{path / name} is damaged: its SHA-256 is not the one in {MANIFEST}")
        weights = safetensors.torch.load_file(path / WEIGHTS)
        state = torch.load(path / STATE, map_location="cpu", weights_only=True)
    return Checkpoint(manifest, weights, state)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, pickle.UnpicklingError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error}") from error


def write_text(path: Path, text: str) -> None:
    """Write a file and flush it to disk."""
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _flush_and_hash(path: Path) -> str:
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return _hash(path)


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def flush_folder(path: Path) -> None:
    """Make renames in a folder durable; some file systems refuse, which is no error."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)
