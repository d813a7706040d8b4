"""The checkpoints of a run: which there are, which is newest, best and to be kept. Rank 0 calls it.

    RUN_DIR/checkpoints/step-00000200/     a complete checkpoint, see `checkpoint`
    RUN_DIR/checkpoints/latest, best       names of the newest, and of the best by held-out loss

A checkpoint is written under a temporary name, flushed to disk and renamed, and `latest` is replaced last: at any
moment `latest` names a complete checkpoint.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hvdtrain.errors import CheckpointError
from hvdtrain.process.run_files import BEST, LATEST, named_checkpoint
from hvdtrain.rundir.checkpoint import (
    Checkpoint,
    Manifest,
    flush_folder,
    load_checkpoint,
    read_manifest,
    write_checkpoint,
    write_text,
)

_TEMPORARY = ".writing-"
# Eight digits, more from step 10^8 on. Any other name is a copy that the user made.
_NAME = re.compile(r"step-(\d{8}|[1-9]\d{8,})")


@dataclass(frozen=True)
class Retention:
    """Which checkpoints are kept besides the newest and the best: the last few, and every so many steps one."""

    keep_last: int | None = None
    keep_every: int | None = None


@dataclass
class Checkpoints:
    """The folder of a run's checkpoints."""

    folder: Path

    def path_of(self, step: int) -> Path:
        """Return where the checkpoint of a step is, or would be."""
        return self.folder / f"step-{step:08d}"

    def by_step(self) -> dict[int, Path]:
        """Return the complete checkpoints, oldest first. One that was half written has no name yet."""
        if not self.folder.is_dir():
            return {}
        named = [(_NAME.fullmatch(path.name), path) for path in self.folder.iterdir() if path.is_dir()]
        return dict(sorted((int(match[1]), path) for match, path in named if match))

    def named(self, pointer: str) -> Path | None:
        """Return the checkpoint that `latest` or `best` names; None where it names none."""
        name = named_checkpoint(self.folder.parent, pointer)
        return self.folder / name if _NAME.fullmatch(name) else None

    def newest_manifest(self) -> Manifest | None:
        """Return what the newest checkpoint whose manifest is readable says of itself; None without any."""
        for path in reversed(self.by_step().values()):
            try:
                return read_manifest(path)
            except CheckpointError:
                continue
        return None

    def load_newest(self, warn: Callable[[str], None]) -> Checkpoint | None:
        """Read the newest checkpoint that is good; None without any. Warns of each damaged one that is passed over.

        Raises:
            CheckpointError: there are checkpoints, but none is good.
        """
        found = self.by_step()
        for path in reversed(found.values()):
            try:
                return load_checkpoint(path)
            except CheckpointError as error:
                warn(f"warning: {error}; trying the one before it")
        if found:
            raise CheckpointError(
                f"none of the {len(found)} checkpoints in {self.folder.parent} is good: choose another --run-dir"
            )
        return None

    def save(
        self, manifest: Manifest, weights: Mapping[str, Tensor], state: Mapping[str, Any], retention: Retention
    ) -> Path:
        """Write one checkpoint, then point `latest` (and `best`) to it, then delete what `retention` does not keep.

        Raises:
            CheckpointError: the files could not be written; what was there before is still good.
        """
        final = self.path_of(manifest.step)
        temporary = self.folder / f"{_TEMPORARY}{final.name}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _remove(temporary)
            temporary.mkdir()
            write_checkpoint(temporary, manifest, weights, state)
            _remove(final)
            temporary.rename(final)
            self._point(LATEST, final)
            best = self._lowest_loss()
            if best is not None:
                self._point(BEST, best)
            flush_folder(self.folder)
            self._prune(retention, best)
        except (OSError, RuntimeError, CheckpointError) as error:
            raise CheckpointError(
                f"checkpoint {final} could not be written ({error}); earlier ones are intact"
            ) from error
        return final

    def _lowest_loss(self) -> Path | None:
        """Return the checkpoint with the lowest held-out loss, of those that were evaluated when they were saved."""
        losses = {}
        for path in self.by_step().values():
            try:
                loss = read_manifest(path).val_loss
            except CheckpointError:  # damaged: loading will say so
                continue
            if loss is not None and math.isfinite(loss):
                losses[path] = loss
        return min(losses, key=lambda path: losses[path]) if losses else None

    def _prune(self, retention: Retention, best: Path | None) -> None:
        """Delete what need not be kept, the oldest first, and what an interrupted save left behind."""
        complete = self.by_step()
        last = list(complete)[-retention.keep_last :] if retention.keep_last else list(complete)
        for step, path in complete.items():
            is_kept = retention.keep_every is not None and step % retention.keep_every == 0
            if step not in last and path != best and not is_kept:
                _remove(path)
        for path in self.folder.glob(f"{_TEMPORARY}*"):
            _remove(path)

    def _point(self, name: str, target: Path) -> None:
        """Make the file `name` hold the name of a checkpoint, in one step."""
        temporary = self.folder / f"{_TEMPORARY}{name}"
        write_text(temporary, target.name + "\n")
        temporary.replace(self.folder / name)


def _remove(path: Path) -> None:
    if path.is_dir():
        # Out of the way first: a half-deleted folder must not carry a checkpoint's name.
        doomed = path if path.name.startswith(_TEMPORARY) else path.rename(path.parent / f"{_TEMPORARY}old-{path.name}")
        shutil.rmtree(doomed)
    else:
        path.unlink(missing_ok=True)
