"""Checkpoints: saved atomically, verified when loaded. Knows no ranks: rank 0 calls it.

    RUN_DIR/checkpoints/step-00000200/model.safetensors   weights, by parameter name
                                     /state.pt            everything else; loads with `weights_only=True`
                                     /manifest.json       format version, step, samples, world size, file hashes
    RUN_DIR/checkpoints/latest, best                      names of the newest, and of the best by held-out loss

A checkpoint is written under a temporary name, flushed to disk and renamed, and `latest` is replaced last: at any
moment `latest` names a complete checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from hvdtrain.errors import CheckpointError, ResumeError

FORMAT_VERSION = 2
_LATEST = "latest"
_BEST = "best"
_TEMPORARY = ".writing-"


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself."""

    step: int
    samples: int
    world_size: int
    sha256: dict[str, str]
    val_loss: float | None = None
    """Held-out loss of these weights, if they were evaluated when they were saved."""
    global_batch_size: int | None = None
    micro_batch_size: int | None = None
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True)
class Retention:
    """Which checkpoints are kept besides the newest and the best: the last few, and every so many steps one."""

    keep_last: int | None = None
    keep_every: int | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and verified."""

    manifest: Manifest
    weights: dict[str, Tensor]
    state: dict[str, Any]


def model_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return each parameter and persistent buffer once, by its first name: tied weights are stored once.

    Names are those of the model as it was before `torch.compile`, which puts `_orig_mod.` before them.
    """
    first_names = {name for name, _ in model.named_parameters()} | {name for name, _ in model.named_buffers()}
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items() if name in first_names}
    return {name.replace("_orig_mod.", ""): tensor for name, tensor in tensors.items()}


def load_model_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy `weights`, as from `model_weights`, into the model.

    Raises:
        ResumeError: names or shapes differ; the message names the first few.
    """
    own = model_weights(model)
    missing, unknown = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    shapes = [
        f"{name} is {tuple(weights[name].shape)} in the checkpoint and {tuple(own[name].shape)} in this model"
        for name in sorted(own.keys() & weights.keys())
        if own[name].shape != weights[name].shape
    ]
    problems = [f"{n} is missing from it" for n in missing] + [f"{n} is not in this model" for n in unknown] + shapes
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise ResumeError(f"the checkpoint is of another model: {'; '.join(problems[:3])}{more}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(weights[name])


def save_checkpoint(
    run_dir: Path,
    *,
    weights: Mapping[str, Tensor],
    state: Mapping[str, Any],
    step: int,
    samples: int,
    world_size: int,
    global_batch_size: int | None = None,
    micro_batch_size: int | None = None,
    val_loss: float | None = None,
    retention: Retention | None = None,
) -> Path:
    """Write one checkpoint, then point `latest` (and `best`) to it, then delete what `retention` does not keep.

    Raises:
        CheckpointError: the files could not be written; what was there before is still good.
    """
    folder = run_dir / "checkpoints"
    final = folder / f"step-{step:08d}"
    temporary = folder / f"{_TEMPORARY}{final.name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove(temporary)
        temporary.mkdir()
        safetensors.torch.save_file({n: t.contiguous() for n, t in weights.items()}, temporary / "model.safetensors")
        torch.save(dict(state), temporary / "state.pt")
        hashes = {name: _flush_and_hash(temporary / name) for name in ("model.safetensors", "state.pt")}
        manifest = Manifest(step, samples, world_size, hashes, val_loss, global_batch_size, micro_batch_size)
        _write_text(temporary / "manifest.json", json.dumps(asdict(manifest), indent=2) + "\n")
        _flush_folder(temporary)
        _remove(final)
        temporary.rename(final)
        _point(folder, _LATEST, final)
        best = _best(folder)
        if best is not None:
            _point(folder, _BEST, best)
        _flush_folder(folder)
        _prune(folder, retention or Retention(), best)
    except (OSError, SafetensorError, RuntimeError) as error:  # torch and safetensors have their own for a full disk
        raise CheckpointError(f"checkpoint {final} could not be written ({error}); earlier ones are intact") from error
    return final


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first. One that was half written has no name yet."""
    return sorted(path for path in (run_dir / "checkpoints").glob("step-*") if path.is_dir())


def newest_manifest(run_dir: Path) -> Manifest | None:
    """Return what the newest checkpoint whose manifest is readable says of itself; None without any."""
    for path in reversed(list_checkpoints(run_dir)):
        with suppress(CheckpointError), _reading(path):
            return Manifest(**json.loads((path / "manifest.json").read_text()))
    return None


def load_newest(run_dir: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """Read the newest checkpoint that is good, and warn of each damaged one that is passed over; None without any.

    Raises:
        CheckpointError: there are checkpoints, but none is good.
    """
    paths = list_checkpoints(run_dir)
    for path in reversed(paths):
        try:
            return load_checkpoint(path)
        except CheckpointError as error:
            warn(f"warning: {error}; trying the one before it")
    if paths:
        raise CheckpointError(f"none of the {len(paths)} checkpoints in {run_dir} is good: choose another --run-dir")
    return None


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint to host memory and verify it against its manifest. Nothing in it can run code.

    Raises:
        CheckpointError: a file is missing, damaged, or of a newer format; names the file.
    """
    with _reading(path):
        manifest = Manifest(**json.loads((path / "manifest.json").read_text()))
        if manifest.format_version > FORMAT_VERSION:
            raise CheckpointError(f"{path} was written by a newer hvdtrain (format {manifest.format_version}): update")
        for name, expected in manifest.sha256.items():
            if _hash(path / name) != expected:
                raise CheckpointError(f"{path / name} is damaged: its SHA-256 is not the one in manifest.json")
        weights = safetensors.torch.load_file(path / "model.safetensors")
        state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    return Checkpoint(manifest, weights, state)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, pickle.UnpicklingError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error}") from error


def _best(folder: Path) -> Path | None:
    """Return the checkpoint with the lowest held-out loss, of those that were evaluated when they were saved."""
    losses = {}
    for path in list_checkpoints(folder.parent):
        try:
            loss = json.loads((path / "manifest.json").read_text()).get("val_loss")
        except (OSError, ValueError):  # damaged: loading will say so
            continue
        if loss is not None and math.isfinite(loss):
            losses[path] = loss
    return min(losses, key=lambda path: losses[path]) if losses else None


def _prune(folder: Path, retention: Retention, best: Path | None) -> None:
    """Delete what need not be kept, the oldest first, and what an interrupted save left behind."""
    complete = list_checkpoints(folder.parent)
    last = complete[-retention.keep_last :] if retention.keep_last else complete
    for path in complete:
        step = int(path.name.removeprefix("step-"))
        is_kept = retention.keep_every is not None and step % retention.keep_every == 0
        if path not in last and path != best and not is_kept:
            _remove(path)
    for path in folder.glob(f"{_TEMPORARY}*"):
        _remove(path)


def _point(folder: Path, name: str, target: Path) -> None:
    """Make the file `name` hold the name of a checkpoint, in one step."""
    temporary = folder / f"{_TEMPORARY}{name}"
    _write_text(temporary, target.name + "\n")
    temporary.replace(folder / name)


def _remove(path: Path) -> None:
    if path.is_dir():
        # Out of the way first: a half-deleted folder must not carry a checkpoint's name.
        doomed = path if path.name.startswith(_TEMPORARY) else path.rename(path.parent / f"{_TEMPORARY}old-{path.name}")
        shutil.rmtree(doomed)
    else:
        path.unlink(missing_ok=True)


def _write_text(path: Path, text: str) -> None:
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


def _flush_folder(path: Path) -> None:
    """Make renames in a folder durable; some file systems refuse, which is no error."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)
