"""What a checkpoint says of itself, in `manifest.json`. It is trusted only as far as its own checksum goes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hvdtrain.errors import CheckpointError, reason_of

FORMAT_VERSION = 4
# Of a checkpoint that one rank has written: an older hvdtrain reads it. All ranks: it would miss their parts.
UNDIVIDED_FORMAT, DIVIDED_FORMAT = 3, 4
# Older manifests have no checksum, and not all fields.
_FIRST_WITH_CHECKSUM = 3
WEIGHTS, STATE, MANIFEST = "model.safetensors", "state.pt", "manifest.json"
_MOST_BYTES = 1 << 22
_CHECKSUM = "checksum"


def part_name(rank: int) -> str:
    """Return the name of the file that a rank has written for itself."""
    return f"state-rank-{rank:03d}.pt"


class NewerFormatError(CheckpointError):
    """A checkpoint that was written by a newer hvdtrain: it is good, only not for this one."""


@dataclass(frozen=True, kw_only=True)
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
    """The largest that memory is known to hold, whatever fitted the number of ranks."""
    skipped_in_a_row: int = 0
    """Steps just before the save that were skipped, because a loss or gradient was not finite."""
    is_finite: bool = True
    """Whether all weights are finite numbers."""
    sizes: dict[str, int] | None = None
    """Bytes of each file, where all ranks have written; filled in then."""
    format_version: int = UNDIVIDED_FORMAT

    @property
    def is_healthy(self) -> bool:
        """Return whether training can go on from here as it should."""
        return self.is_finite and self.skipped_in_a_row == 0

    @property
    def is_divided(self) -> bool:
        """Return whether each rank has written a part of it."""
        return self.format_version >= DIVIDED_FORMAT


def encode_manifest(manifest: Manifest) -> str:
    """Return the text of a manifest, with a checksum of the rest of it."""
    values = dataclasses.asdict(manifest)
    if manifest.sizes is None:
        del values["sizes"]  # an older hvdtrain does not know the field
    return json.dumps({**values, _CHECKSUM: _checksum(values)}, indent=2) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """Read what the checkpoint in `folder` says of itself.

    Raises:
        CheckpointError: it is missing or damaged; `NewerFormatError` where a newer hvdtrain has written it.
    """
    path = regular_file(folder / MANIFEST)
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {reason_of(error)}") from error
    return decode_manifest(content, path)


def decode_manifest(content: bytes, path: Path) -> Manifest:
    """Return the manifest in the content of a file; `path` is for messages.

    Raises:
        CheckpointError: as `read_manifest`.
    """
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: it is not JSON") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is damaged: it holds no JSON object")
    version, is_old = values.get("format_version"), False
    if type(version) is int and version < _FIRST_WITH_CHECKSUM:
        values, is_old = {"skipped_in_a_row": 0, "is_finite": True, **values}, True
    if not is_old and values.pop(_CHECKSUM, None) != _checksum(values):
        raise CheckpointError(f"{path} is damaged: its checksum does not fit it")
    if type(version) is int and version > FORMAT_VERSION:
        raise NewerFormatError(f"{path.parent} was written by a newer hvdtrain (format {version}): update this one")
    odd = [name for name in values.keys() | _RULES.keys() if name not in _RULES or not _RULES[name](values.get(name))]
    odd = odd or ([] if _has_all_files(values) else ["sha256"])
    if odd:
        raise CheckpointError(f"{path} is damaged: it has no good value for {', '.join(sorted(odd)[:3])}")
    return Manifest(**values)


def regular_file(path: Path) -> Path:
    """Return the path of a checkpoint's file if it is one: no device, no pipe, no link out of the checkpoints.

    Raises:
        CheckpointError: it is missing, or something else.
    """
    try:
        if not path.resolve().is_relative_to(path.parent.parent.resolve()):
            raise CheckpointError(f"{path} is a link that leads elsewhere: put a copy of the file in its place")
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(f"{path} is no regular file")
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except (OSError, RuntimeError) as error:  # a link that leads in a circle is a RuntimeError before Python 3.13
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return path


def _checksum(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_hashes(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(digest, str) and len(digest) == 64 for digest in value.values())


def _is_sizes(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and all(_is_count(size) for size in value.values()))


def _has_all_files(values: dict[str, Any]) -> bool:
    """Return whether there is a hash of each file that such a checkpoint has, of no other, and as many sizes."""
    names, sizes = {WEIGHTS, STATE}, values.get("sizes")
    if values["format_version"] < DIVIDED_FORMAT:
        return bool(values["sha256"].keys() == names and sizes is None)
    names |= {part_name(rank) for rank in range(min(values["world_size"], len(values["sha256"])))}
    return bool(sizes is not None and values["sha256"].keys() == sizes.keys() == names)


_RULES: dict[str, Callable[[Any], bool]] = {
    "step": _is_count,
    "samples": _is_count,
    "world_size": lambda value: _is_count(value) and value > 0,
    "sha256": _is_hashes,
    "sizes": _is_sizes,
    "val_loss": lambda value: value is None or type(value) in (int, float),
    "global_batch_size": lambda value: value is None or (_is_count(value) and value > 0),
    "micro_batch_size": lambda value: value is None or (_is_count(value) and value > 0),
    "skipped_in_a_row": _is_count,
    "is_finite": lambda value: type(value) is bool,
    "format_version": lambda value: _is_count(value) and 0 < value <= FORMAT_VERSION,
}
